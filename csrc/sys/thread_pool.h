// Worker threads that take chunks of work from a shared counter.
//
// A run is split into many more chunks than there are threads; whoever is free takes the next one,
// and the caller waits for chunks, not for threads. A worker that the OS has taken off its core
// therefore costs at most the one chunk it holds, never a barrier.
//
// On a machine with NUMA nodes every node has its threads and its counter. Chunks that read what
// lies on a node are taken by its threads alone, and the caller waits for one counter per node.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "sys/nodes.h"
#include "sys/row_split.h"

namespace mla::sys {

struct ThreadPoolOptions {
  int n_threads = 0;      // including the caller; 0: the physical cores it may use, of its nodes
  std::vector<int> cpus;  // worker i is pinned to cpus[i % size]; empty: not pinned
  int spin_us = 50;       // how long an idle worker spins before it sleeps
  // Threads are shared out by weight, in this order, and run on the CPUs of their node; with `cpus`
  // a thread belongs to the node that has its CPU. None: one node with all CPUs.
  std::vector<NodeShare> nodes;
};

class ThreadPool {
 public:
  // Throws DeviceError for a CPU it may not use and where threads cannot be started.
  explicit ThreadPool(const ThreadPoolOptions& options = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const;
  int n_nodes() const;
  int node_of(int thread) const;
  const std::vector<NodeShare>& nodes() const;  // as given
  // Threads of each node.
  std::span<const int64_t> node_threads() const;
  // CPUs of thread 0's node: where a caller should be while it calls. Empty where any will do.
  const std::vector<int>& caller_cpus() const;

  // Calls body(chunk, thread) once for every chunk in [0, n_chunks), from the caller (thread 0)
  // and the workers; returns when all are done. thread < n_threads() and no two bodies run with
  // the same thread number at once: it may index per-thread scratch. body must not throw and must
  // not call parallel_for. One caller at a time (others wait). A forked child has no workers: they
  // are started anew at its first run, which throws DeviceError where that fails.
  template <class Body>
  void parallel_for(int64_t n_chunks, const Body& body) {
    run(n_chunks, {}, call<Body>, &body);
  }

  // The same for chunks that have a node: those in [begins[i], begins[i + 1]) are for threads of
  // node i, begins [n_nodes + 1] rising from 0. Where a node has no threads, any take them, and so
  // they do where begins are for another number of nodes.
  template <class Body>
  void parallel_for(std::span<const int64_t> begins, const Body& body) {
    run(begins.back(), begins, call<Body>, &body);
  }

 private:
  using Entry = void (*)(const void* body, int64_t chunk, int thread);
  template <class Body>
  static void call(const void* body, int64_t chunk, int thread) {
    (*static_cast<const Body*>(body))(chunk, thread);
  }
  void run(int64_t n_chunks, std::span<const int64_t> begins, Entry entry, const void* body);
  struct Node;
  struct State;
  const State& state() const;
  State& own_state();
  std::atomic<State*> state_ = nullptr;
};

// Calls body(tile, chunk, thread) for every one of n_tiles with every chunk of the split, where the
// chunk's node is.
template <class Body>
void for_tiles(ThreadPool& pool, const NodeSplit& split, int64_t n_tiles, const Body& body) {
  std::array<int64_t, kMaxNodes + 1> begins;
  const auto n = static_cast<size_t>(split.n_nodes) + 1;
  for (size_t i = 0; i < n; ++i) begins[i] = n_tiles * split.chunks[i];
  pool.parallel_for(std::span<const int64_t>(begins.data(), n), [&](int64_t index, int thread) {
    size_t node = 0;
    while (index >= begins[node + 1]) ++node;
    const int64_t n_chunks = split.chunks[node + 1] - split.chunks[node];
    const int64_t inner = index - begins[node];
    body(inner / n_chunks, split.chunks[node] + inner % n_chunks, thread);
  });
}

}  // namespace mla::sys
