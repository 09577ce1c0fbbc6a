#include "sys/memory.h"

#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <limits>

#include "base/error.h"
#include "sys/cgroup.h"
#include "sys/file.h"
#include "sys/parallel_read.h"

namespace mla::sys {
namespace {

// statfs() types, from the kernel's headers or, where those lack them, from the file systems.
constexpr uint32_t kNetworkFileSystems[] = {
    0x00006969,  // NFS
    0x0000517b,  // SMB
    0xff534d42,  // CIFS
    0xfe534d42,  // SMB2
    0x65735546,  // FUSE
    0x01021997,  // 9P
    0x00c36400,  // Ceph
    0x0bd00bd0,  // Lustre
    0x47504653,  // GPFS
    0x19830326,  // BeeGFS
    0x5346414f,  // AFS
    0x6b414653,  // kAFS
    0x73757245,  // Coda
    0xaad7aaea,  // PanFS
    0x20030528,  // OrangeFS
    0x7461636f,  // OCFS2
    0x786f4256,  // VirtualBox shared folder
};

// "Name:   123 kB" in /proc files, as bytes; a negative number where it is missing.
int64_t read_kb_line(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(name + ":")) return std::stoll(line.substr(name.size() + 1)) * 1024;
  }
  return -1;
}

// What a resource limit leaves, given what this process uses of it by /proc/self/status.
int64_t left_of_limit(int resource, const std::string& root, const std::string& used_name) {
  constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
  rlimit limit;
  if (getrlimit(static_cast<__rlimit_resource_t>(resource), &limit) != 0) return kUnlimited;
  if (limit.rlim_cur == RLIM_INFINITY || limit.rlim_cur > static_cast<rlim_t>(kUnlimited)) {
    return kUnlimited;
  }
  const int64_t used = read_kb_line(root + "/proc/self/status", used_name);
  return std::max<int64_t>(0, static_cast<int64_t>(limit.rlim_cur) - std::max<int64_t>(0, used));
}

}  // namespace

int64_t available_memory_bytes(const std::string& root) {
  int64_t bytes = read_kb_line(root + "/proc/meminfo", "MemAvailable");
  if (bytes < 0) {
    bytes = static_cast<int64_t>(sysconf(_SC_AVPHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  }
  if (const auto free = cgroup_free_bytes(root)) bytes = std::min(bytes, *free);
  bytes = std::min(bytes, left_of_limit(RLIMIT_AS, root, "VmSize"));
  return std::min(bytes, left_of_limit(RLIMIT_DATA, root, "VmData"));
}

bool is_network_fs(const std::string& path) {
  struct statfs info;
  if (statfs(path.c_str(), &info) != 0) {
    throw DeviceError(concat(path, ": its file system cannot be examined: ", os_error(errno)));
  }
  const auto type = static_cast<uint32_t>(info.f_type);
  return std::find(std::begin(kNetworkFileSystems), std::end(kNetworkFileSystems), type) !=
         std::end(kNetworkFileSystems);
}

Pages::Pages(int64_t n_bytes) : size_bytes_(n_bytes) {
  if (n_bytes == 0) return;
  void* memory = mmap(nullptr, static_cast<size_t>(n_bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  MLA_CHECK(MemoryLimitError, memory != MAP_FAILED, "cannot allocate ", n_bytes,
            " bytes: ", os_error(errno));
  // A hint only: fewer translations to miss when weights stream through.
  madvise(memory, static_cast<size_t>(n_bytes), MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(memory);
}

Pages::~Pages() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(size_bytes_));
}

void disable_huge_pages() {
  MLA_CHECK(DeviceError, prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0,
            "huge pages cannot be switched off: ", os_error(errno));
}

LoadedFile::LoadedFile(const std::string& path, int n_threads, PageCache page_cache,
                       const ReadProgress& progress)
    : path_(path), pages_(File(path).size_bytes()) {
  const ReadTeam team = {{}, n_threads, {{0, 0, pages_.size_bytes(), pages_.data()}}};
  read_in_parallel({&path, 1}, {&team, 1}, page_cache, progress);
}

}  // namespace mla::sys
