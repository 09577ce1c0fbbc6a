// Worker threads that take chunks of work from a shared counter.
//
// A run is split into many more chunks than there are threads; whoever is free takes the next one,
// and the caller waits for chunks, not for threads. A worker that the OS has taken off its core
// therefore costs at most the one chunk it holds, never a barrier.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace mla::sys {

struct ThreadPoolOptions {
  int n_threads = 0;      // including the caller; 0: the physical cores it may use
  std::vector<int> cpus;  // worker i is pinned to cpus[i % size]; empty: not pinned
  int spin_us = 50;       // how long an idle worker spins before it sleeps
};

class ThreadPool {
 public:
  // Throws DeviceError for a CPU it may not use and where threads cannot be started.
  explicit ThreadPool(const ThreadPoolOptions& options = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const;

  // Calls body(chunk, thread) once for every chunk in [0, n_chunks), from the caller (thread 0)
  // and the workers; returns when all are done. thread < n_threads() and no two bodies run with
  // the same thread number at once: it may index per-thread scratch. body must not throw and must
  // not call parallel_for. One caller at a time (others wait). A forked child has no workers: they
  // are started anew at its first run, which throws DeviceError where that fails.
  template <class Body>
  void parallel_for(int64_t n_chunks, const Body& body) {
    run(
        n_chunks,
        [](const void* b, int64_t chunk, int thread) {
          (*static_cast<const Body*>(b))(chunk, thread);
        },
        &body);
  }

 private:
  using Entry = void (*)(const void* body, int64_t chunk, int thread);
  void run(int64_t n_chunks, Entry entry, const void* body);
  struct State;
  State& own_state();
  std::atomic<State*> state_ = nullptr;
};

// How to cut n_rows into chunks: enough of them that n_threads stay busy when one is disturbed,
// each a multiple of `granule` rows (but for the last). Depends on nothing else, so the same
// function can place rows on NUMA nodes.
struct RowSplit {
  int64_t n_rows;
  int64_t rows_per_chunk;
  int64_t n_chunks() const {
    return rows_per_chunk ? (n_rows + rows_per_chunk - 1) / rows_per_chunk : 0;
  }
  int64_t begin(int64_t chunk) const { return chunk * rows_per_chunk; }
  int64_t end(int64_t chunk) const {
    const int64_t e = (chunk + 1) * rows_per_chunk;
    return e < n_rows ? e : n_rows;
  }
};
RowSplit split_rows(int64_t n_rows, int n_threads, int64_t granule = 1, int64_t min_rows = 1);

}  // namespace mla::sys
