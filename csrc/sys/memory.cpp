#include "sys/memory.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <fstream>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.h"
#include "sys/cgroup.h"
#include "sys/file.h"

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

// One piece per read: long enough to stream, short enough that the readers end together.
constexpr int64_t kPieceBytes = int64_t{8} << 20;
constexpr int kDefaultReaders = 8;
constexpr auto kProgressInterval = std::chrono::milliseconds(100);

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

// Splits ranges into pieces, hands them to the readers, and keeps the first failure.
class ParallelRead {
 public:
  ParallelRead(const std::string& path, std::span<const FileRange> ranges)
      : path_(path), file_(path) {
    for (const FileRange& range : ranges) {
      for (int64_t at = 0; at < range.n_bytes; at += kPieceBytes) {
        pieces_.push_back(
            {range.offset + at, std::min(kPieceBytes, range.n_bytes - at), range.out + at});
      }
      total_bytes_ += range.n_bytes;
    }
  }

  void run(int n_threads, const ReadProgress& progress) {
    const int64_t n_pieces = static_cast<int64_t>(pieces_.size());
    n_running_ = static_cast<int>(std::min<int64_t>(n_threads, n_pieces));
    std::vector<std::jthread> readers;
    // Whatever leaves this function, the readers are told to stop before they are joined.
    struct Stopper {
      std::atomic<bool>& stop;
      ~Stopper() { stop = true; }
    };
    const Stopper stopper{stop_};
    for (int i = n_running_; i > 0; --i) readers.emplace_back([this] { read_pieces(); });
    report_until_done(progress);
    const std::lock_guard lock(mutex_);
    if (!failure_.empty()) throw DeviceError(failure_);
  }

 private:
  void report_until_done(const ReadProgress& progress) {
    bool running = true;
    while (running) {
      {
        std::unique_lock lock(mutex_);
        running = !ended_.wait_for(lock, kProgressInterval, [this] { return n_running_ == 0; });
        if (!failure_.empty()) return;
      }
      if (progress) progress(done_bytes_, total_bytes_);
    }
  }

  void read_pieces() {
    while (!stop_) {
      const size_t next = next_piece_.fetch_add(1);
      if (next >= pieces_.size() || !read_piece(pieces_[next])) break;
    }
    const std::lock_guard lock(mutex_);
    --n_running_;
    ended_.notify_all();
  }

  bool read_piece(const FileRange& piece) {
    int64_t at = 0;
    while (at < piece.n_bytes && !stop_) {
      const ssize_t got = pread(file_.fd(), piece.out + at, static_cast<size_t>(piece.n_bytes - at),
                                piece.offset + at);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return fail(concat(path_, ": reading failed: ", os_error(errno)));
      if (got == 0) {
        return fail(concat(path_, ": ends at byte ", piece.offset + at, ", expected ",
                           piece.n_bytes - at, " more"));
      }
      at += got;
      done_bytes_ += got;
    }
    return true;
  }

  bool fail(const std::string& message) {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = message;
    stop_ = true;
    return false;
  }

  std::string path_;
  File file_;
  std::vector<FileRange> pieces_;
  int64_t total_bytes_ = 0;
  std::atomic<size_t> next_piece_ = 0;
  std::atomic<int64_t> done_bytes_ = 0;
  std::atomic<bool> stop_ = false;
  std::mutex mutex_;
  std::condition_variable ended_;
  int n_running_ = 0;
  std::string failure_;
};

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

void read_file_parallel(const std::string& path, std::span<const FileRange> ranges, int n_threads,
                        const ReadProgress& progress) {
  ParallelRead(path, ranges).run(n_threads > 0 ? n_threads : kDefaultReaders, progress);
}

Pages::Pages(int64_t n_bytes) : size_bytes_(n_bytes) {
  if (n_bytes == 0) return;
  void* memory = mmap(nullptr, static_cast<size_t>(n_bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  MLA_CHECK(MemoryLimitError, memory != MAP_FAILED, "allocation of ", n_bytes,
            " bytes failed: ", os_error(errno));
  // A hint only: fewer translations to miss when weights stream through.
  madvise(memory, static_cast<size_t>(n_bytes), MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(memory);
}

Pages::~Pages() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(size_bytes_));
}

LoadedFile::LoadedFile(const std::string& path, int n_threads, const ReadProgress& progress)
    : path_(path), pages_(File(path).size_bytes()) {
  const FileRange whole = {0, pages_.size_bytes(), pages_.data()};
  read_file_parallel(path, {&whole, 1}, n_threads, progress);
}

}  // namespace mla::sys
