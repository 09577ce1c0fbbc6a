// How much memory there is, and files as memory: mapped, or read by several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "sys/parallel_read.h"

namespace mla::sys {

// Bytes of anonymous memory that this process may still take: the least of what the machine has
// available (page cache included), what its cgroups leave, and RLIMIT_AS and RLIMIT_DATA.
// `root` stands before /proc and /sys (tests give a made-up tree).
int64_t available_memory_bytes(const std::string& root = "");

// Whether the file system holding `path` fetches pages over a network or from a user process: page
// faults there wait for one round trip each, so that reading ahead with several threads is faster
// than mapping. Throws DeviceError where the path cannot be examined.
bool is_network_fs(const std::string& path);

// Anonymous memory, on page boundaries, zero until written. Throws MemoryLimitError.
class Pages {
 public:
  explicit Pages(int64_t n_bytes);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  std::byte* data() const { return data_; }
  int64_t size_bytes() const { return size_bytes_; }

 private:
  std::byte* data_ = nullptr;
  int64_t size_bytes_;
};

// From now on the process gets no huge pages, whatever memory asks for them. Throws DeviceError
// where the kernel has no such switch.
void disable_huge_pages();

// A whole file in anonymous memory.
class LoadedFile {
 public:
  // n_threads: readers, 0 for the default.
  LoadedFile(const std::string& path, int n_threads, PageCache page_cache,
             const ReadProgress& progress);
  const std::byte* data() const { return pages_.data(); }
  int64_t size_bytes() const { return pages_.size_bytes(); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  Pages pages_;
};

}  // namespace mla::sys
