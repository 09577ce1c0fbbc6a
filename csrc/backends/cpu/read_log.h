// Which weights each thread read, and from which nodes: for the report on traffic between nodes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mla::cpu {

// Written by the tasks that multiply, each thread for itself. The kernel is asked for the nodes of
// pages afterwards.
class ReadLog {
 public:
  explicit ReadLog(int n_threads) : threads_(static_cast<size_t>(n_threads)) {}

  // n_bytes at begin, read by this thread now.
  void add(int thread, const std::byte* begin, int64_t n_bytes);

  struct Traffic {
    int thread;
    int from;  // NUMA node of the thread at that time
    int to;    // NUMA node of the bytes
    int64_t n_bytes;
  };
  // What was read since the last call. Throws DeviceError where the system does not tell.
  std::vector<Traffic> take();

 private:
  struct Read {
    const std::byte* begin;
    int64_t n_bytes;
    int from;
  };
  struct alignas(64) Thread {  // no two threads write to one cache line
    std::vector<Read> reads;
  };
  std::vector<Thread> threads_;
};

}  // namespace mla::cpu
