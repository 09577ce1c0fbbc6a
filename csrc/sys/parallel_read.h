// Files read into memory by teams of threads, each next to the memory that it fills.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace mla::sys {

// Runs of bytes at equal distances in a file, and where they go, at equal distances as well. The
// same rows of every expert are such runs.
struct FileRuns {
  int file;         // index of the paths
  int64_t offset;   // of the first run
  int64_t n_bytes;  // of each run
  std::byte* out;
  int64_t n_runs = 1;
  int64_t file_stride = 0;  // bytes from run to run
  int64_t out_stride = 0;
};

// Threads that read some of the runs.
struct ReadTeam {
  std::vector<int> cpus;  // where its threads stay; empty: anywhere
  int n_threads = 0;      // 0: eight, which hides the round trips of a network file system
  std::vector<FileRuns> runs;
};

struct TeamResult {
  int64_t n_bytes = 0;
  double seconds = 0;   // until its last run was in place
  bool direct = false;  // some of it bypassed the page cache
};

// What becomes of the kernel's own copy of what was read. `bypass` is for files that memory cannot
// hold twice: read past the page cache where the file system can do that, else dropped from the
// page cache piece by piece behind the reader.
enum class PageCache { keep, bypass };

// Bytes done by each team. Called from the calling thread only, a few times per second and at the
// end. What it throws stops the reading and leaves read_in_parallel().
using ReadProgress = std::function<void(std::span<const int64_t> done_bytes)>;

// All teams read at once. Throws DeviceError naming the file where one ends early or fails.
std::vector<TeamResult> read_in_parallel(std::span<const std::string> paths,
                                         std::span<const ReadTeam> teams, PageCache page_cache,
                                         const ReadProgress& progress);

}  // namespace mla::sys
