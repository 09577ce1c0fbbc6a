// How much memory there is, and files as memory: mapped, or read by several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

namespace mla::sys {

// Bytes of anonymous memory that this process may still take: the least of what the machine has
// available (page cache included), what its cgroups leave, and RLIMIT_AS and RLIMIT_DATA.
// `root` stands before /proc and /sys (tests give a made-up tree).
int64_t available_memory_bytes(const std::string& root = "");

// Whether the file system holding `path` fetches pages over a network or from a user process: page
// faults there wait for one round trip each, so that reading ahead with several threads is faster
// than mapping. Throws DeviceError where the path cannot be examined.
bool is_network_fs(const std::string& path);

struct FileRange {
  int64_t offset;
  int64_t n_bytes;
  std::byte* out;
};

// Called from the calling thread only, a few times per second and at the end. What it throws stops
// the reading and leaves read_file_parallel().
using ReadProgress = std::function<void(int64_t done_bytes, int64_t total_bytes)>;

// Reads the ranges into their memory with n_threads readers (0: eight, which hides the round trips
// of a network file system). Throws DeviceError naming the file where it ends early or fails.
void read_file_parallel(const std::string& path, std::span<const FileRange> ranges, int n_threads,
                        const ReadProgress& progress);

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

// A whole file in anonymous memory.
class LoadedFile {
 public:
  LoadedFile(const std::string& path, int n_threads, const ReadProgress& progress);
  const std::byte* data() const { return pages_.data(); }
  int64_t size_bytes() const { return pages_.size_bytes(); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  Pages pages_;
};

}  // namespace mla::sys
