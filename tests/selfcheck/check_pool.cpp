// The thread pool: every chunk once, no thread number twice at a time, several callers, its end;
// and whether its workers leave the core of their caller.
#include <sched.h>

#include <atomic>
#include <thread>

#include "check.h"
#include "sys/core_sharing.h"
#include "sys/thread_pool.h"
#include "sys/topology.h"

namespace selfcheck {
namespace {

constexpr int kRuns = 300;
constexpr int kPools = 20000;

mla::sys::ThreadPoolOptions with_threads(int n_threads) {
  mla::sys::ThreadPoolOptions options;
  options.n_threads = n_threads;
  return options;
}

bool every_chunk_once(mla::sys::ThreadPool& pool, int64_t n_chunks) {
  std::vector<int> seen(static_cast<size_t>(n_chunks));
  pool.parallel_for(n_chunks, [&](int64_t chunk, int) { ++seen[static_cast<size_t>(chunk)]; });
  for (int times : seen) {
    if (times != 1) return false;
  }
  return true;
}

bool thread_numbers_are_exclusive(mla::sys::ThreadPool& pool) {
  std::vector<std::atomic<int>> busy(static_cast<size_t>(pool.n_threads()));
  std::atomic<bool> shared = false;
  pool.parallel_for(200, [&](int64_t, int thread) {
    if (busy[static_cast<size_t>(thread)].fetch_add(1) != 0) shared = true;
    busy[static_cast<size_t>(thread)].fetch_sub(1);
  });
  return !shared;
}

bool callers_take_turns(mla::sys::ThreadPool& pool) {
  std::atomic<int64_t> total = 0;
  const auto call = [&] {
    for (int i = 0; i < kRuns; ++i) {
      pool.parallel_for(7, [&](int64_t chunk, int) { total += chunk; });
    }
  };
  std::thread other(call);
  call();
  other.join();
  return total == 2 * kRuns * 21;
}

// Workers that are just starting, or just going to sleep, must not miss that their pool ends.
void pools_end() {
  for (int i = 0; i < kPools; ++i) {
    mla::sys::ThreadPoolOptions options = with_threads(2 + i % 3);
    options.spin_us = i % 2 ? 0 : 20;
    mla::sys::ThreadPool pool(options);
    if (i % 4 == 0) pool.parallel_for(8, [](int64_t, int) {});
  }
}

// A thread that says it is on the CPU of its caller is not allowed there afterwards, as long as it
// may run elsewhere.
bool worker_leaves_its_caller() {
  const std::vector<int> before = mla::sys::usable_cpus();
  bool left = false;
  std::thread worker([&] {
    mla::sys::CoreSharing sharing(true);
    for (int i = 0; i < kRuns && !left; ++i) {  // it may be moved between two looks
      const int cpu = sched_getcpu();
      sharing.between_chunks(cpu);
      std::vector<int> others = before;
      std::erase(others, cpu);
      left = mla::sys::usable_cpus() == (others.empty() ? before : others);
    }
  });
  worker.join();
  return left && mla::sys::usable_cpus() == before;
}

// Made-up nodes, all with the same CPUs; the last has none where `bare`.
mla::sys::ThreadPoolOptions on_nodes(int n_threads, int n_nodes, bool bare) {
  mla::sys::ThreadPoolOptions options = with_threads(n_threads);
  for (int i = 0; i < n_nodes; ++i) {
    options.nodes.push_back({{0}, mla::sys::usable_cpus(), 1 + i % 2});
  }
  if (bare) options.nodes.back().cpus.clear();
  return options;
}

// Chunks of nodes: each runs once, on a thread of its node where that has any.
bool chunks_stay_on_their_nodes(mla::sys::ThreadPool& pool, int64_t per_node) {
  std::vector<int64_t> begins = {0};
  for (int i = 0; i < pool.n_nodes(); ++i) begins.push_back(begins.back() + i % 3 * per_node);
  std::vector<int> seen(static_cast<size_t>(begins.back()));
  std::atomic<bool> strayed = false;
  pool.parallel_for(std::span<const int64_t>(begins), [&](int64_t chunk, int thread) {
    ++seen[static_cast<size_t>(chunk)];
    size_t node = 0;
    while (chunk >= begins[node + 1]) ++node;
    const bool has_threads = pool.node_threads()[node] > 0;
    if (has_threads && pool.node_of(thread) != static_cast<int>(node)) strayed = true;
  });
  for (int times : seen) {
    if (times != 1) return false;
  }
  return !strayed || pool.n_threads() == 1;
}

bool tiles_cover_all(mla::sys::ThreadPool& pool) {
  constexpr int64_t kTiles = 5;
  const std::vector<int64_t> begins = {0, 48, 48, 130};
  const mla::sys::NodeSplit split = mla::sys::split_on_nodes(begins, 16);
  std::vector<int> seen(static_cast<size_t>(kTiles * begins.back()));
  mla::sys::for_tiles(pool, split, kTiles, [&](int64_t tile, int64_t chunk, int) {
    for (int64_t row = split.begin(chunk); row < split.end(chunk); ++row) {
      ++seen[static_cast<size_t>(tile * begins.back() + row)];
    }
  });
  for (int times : seen) {
    if (times != 1) return false;
  }
  return true;
}

void check_nodes(Report& report, int n_threads, int n_nodes, bool bare) {
  mla::sys::ThreadPool pool(on_nodes(n_threads, n_nodes, bare));
  bool once = true;
  bool at_home = true;
  bool exclusive = true;
  for (int i = 0; i < kRuns; ++i) {
    once = once && every_chunk_once(pool, i % 40);
    at_home = at_home && chunks_stay_on_their_nodes(pool, i % 9);
    exclusive = exclusive && thread_numbers_are_exclusive(pool);
  }
  const std::string with = " with " + std::to_string(n_threads) + " threads on " +
                           std::to_string(n_nodes) + " nodes" + (bare ? ", one bare" : "");
  report.truth("pool", "every chunk once" + with, once);
  report.truth("pool", "chunks stay on their nodes" + with, at_home);
  report.truth("pool", "thread numbers are exclusive" + with, exclusive);
  report.truth("pool", "callers take turns" + with, callers_take_turns(pool));
  report.truth("pool", "tiles cover all" + with, tiles_cover_all(pool));
}

}  // namespace

void check_pool(Report& report) {
  for (int n_threads : {1, 2, 5}) {
    mla::sys::ThreadPool pool(with_threads(n_threads));
    bool once = true;
    bool exclusive = true;
    for (int i = 0; i < kRuns; ++i) {
      once = once && every_chunk_once(pool, i % 40);
      exclusive = exclusive && thread_numbers_are_exclusive(pool);
    }
    const std::string with = " with " + std::to_string(n_threads) + " threads";
    report.truth("pool", "every chunk once" + with, once);
    report.truth("pool", "thread numbers are exclusive" + with, exclusive);
    report.truth("pool", "callers take turns" + with, callers_take_turns(pool));
  }
  for (int n_nodes : {2, 3, 4}) {
    for (int n_threads : {1, 3, 6}) {
      check_nodes(report, n_threads, n_nodes, false);
      check_nodes(report, n_threads, n_nodes, true);
    }
  }
  report.truth("pool", "a worker leaves its caller's core", worker_leaves_its_caller());
  pools_end();
  report.truth("pool", "pools end", true);
}

}  // namespace selfcheck
