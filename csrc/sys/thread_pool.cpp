#include "sys/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

#include "base/error.h"
#include "sys/core_sharing.h"
#include "sys/topology.h"

namespace mla::sys {
namespace {

// One 64-bit word says which run is on, how many chunks it has and which comes next. A chunk is
// claimed by compare-and-swap, so nobody can claim a chunk of a run that has ended.
constexpr int kCountBits = 22;
constexpr int64_t kMaxChunks = (int64_t{1} << kCountBits) - 1;
constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;

// About 0.1 ms of looking whether the others are done, which is longer than most chunks. Who takes
// longer has lost its core; asleep, the caller leaves its own one to whoever needs it.
constexpr int kCallerSpins = 4096;

struct Ticket {
  uint64_t word;
  uint64_t epoch() const { return word >> (2 * kCountBits); }
  int64_t count() const { return static_cast<int64_t>((word >> kCountBits) & kCountMask); }
  int64_t next() const { return static_cast<int64_t>(word & kCountMask); }
  static uint64_t start(uint64_t epoch, int64_t count) {
    return (epoch << (2 * kCountBits)) | (static_cast<uint64_t>(count) << kCountBits);
  }
};

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void pin_this_thread(int cpu) {
  cpu_set_t* set = CPU_ALLOC(cpu + 1);
  if (set == nullptr) return;
  const size_t set_bytes = CPU_ALLOC_SIZE(cpu + 1);
  CPU_ZERO_S(set_bytes, set);
  CPU_SET_S(cpu, set_bytes, set);
  pthread_setaffinity_np(pthread_self(), set_bytes, set);  // checked when the pool is made
  CPU_FREE(set);
}

}  // namespace

struct ThreadPool::State {
  std::vector<int> cpus;
  int n_threads = 1;
  int spin_us = 0;
  bool may_move = false;  // workers go where the caller is not
  pid_t owner = 0;
  std::mutex callers;
  std::vector<std::thread> workers;

  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<uint32_t> wake{0};  // bumped with each run: sleepers wait for a change
  std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false};
  alignas(64) std::atomic<uint32_t> caller_sleeps{0};
  std::atomic<int> caller_cpu{-1};  // where the caller was when the run began
  Entry entry = nullptr;
  const void* body = nullptr;
  int64_t first_chunk = 0;  // the ticket counts from here

  bool work(int thread, CoreSharing* sharing);
  void loop(int thread);
  void start();
  void finish();
  void run_section(int64_t first, int64_t n_chunks);
  void wait_for(int64_t n_chunks);
};

// Claims and runs chunks until the current run has none left. True if it ran any.
bool ThreadPool::State::work(int thread, CoreSharing* sharing) {
  bool any = false;
  uint64_t word = ticket.load(std::memory_order_acquire);
  while (true) {
    Ticket now{word};
    if (now.next() >= now.count()) return any;
    if (sharing != nullptr) {
      sharing->between_chunks(caller_cpu.load(std::memory_order_relaxed));
      word = ticket.load(std::memory_order_acquire);
      now.word = word;
      if (now.next() >= now.count()) return any;
    }
    if (!ticket.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel,
                                      std::memory_order_acquire)) {
      continue;
    }
    entry(body, first_chunk + now.next(), thread);
    const int64_t n_done = done.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (n_done == now.count() && caller_sleeps.exchange(0, std::memory_order_seq_cst) != 0) {
      caller_sleeps.notify_one();
    }
    any = true;
    word = ticket.load(std::memory_order_acquire);
  }
}

void ThreadPool::State::loop(int thread) {
  if (!cpus.empty()) pin_this_thread(cpus[static_cast<size_t>(thread) % cpus.size()]);
  CoreSharing sharing(may_move);
  while (true) {
    // Before `stop`, which is set before the last bump: whoever has seen that bump also sees it.
    const uint32_t seen = wake.load(std::memory_order_acquire);
    if (stop.load(std::memory_order_acquire)) return;
    if (work(thread, &sharing)) continue;
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(spin_us);
    bool woken = false;
    while (!woken && std::chrono::steady_clock::now() < until) {
      for (int i = 0; i < 32; ++i) relax();
      woken = wake.load(std::memory_order_acquire) != seen;
    }
    if (woken) continue;
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    wake.wait(seen, std::memory_order_seq_cst);
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
}

void ThreadPool::State::start() {
  owner = getpid();
  may_move = cpus.empty() && static_cast<size_t>(n_threads) <= usable_cpus().size();
  try {
    for (int i = 1; i < n_threads; ++i) workers.emplace_back([this, i] { loop(i); });
  } catch (const std::system_error& e) {
    finish();
    throw DeviceError(concat("thread pool: only ", workers.size() + 1, " of ", n_threads,
                             " threads could be started: ", e.code().message()));
  }
}

void ThreadPool::State::finish() {
  stop.store(true, std::memory_order_seq_cst);
  wake.fetch_add(1, std::memory_order_seq_cst);
  wake.notify_all();
  for (std::thread& worker : workers) worker.join();
}

ThreadPool::ThreadPool(const ThreadPoolOptions& options) {
  const std::vector<int> allowed = usable_cpus();
  for (int cpu : options.cpus) {
    MLA_CHECK(DeviceError, std::binary_search(allowed.begin(), allowed.end(), cpu),
              "thread pool: CPU ", cpu, " is not among those this process may use");
  }
  MLA_CHECK(ShapeError, options.n_threads >= 0 && options.n_threads <= 4096,
            "thread pool: ", options.n_threads, " threads, accepted is 0 (automatic) to 4096");
  auto state = std::make_unique<State>();
  state->cpus = options.cpus;
  state->spin_us = options.spin_us;
  state->n_threads = options.n_threads > 0 ? options.n_threads : usable_physical_cores();
  state->start();
  state_.store(state.release());
}

ThreadPool::~ThreadPool() {
  State* state = state_.load();
  // A forked child has no such threads; their handles cannot be joined, only forgotten.
  if (state->owner != getpid()) return;
  state->finish();
  delete state;
}

int ThreadPool::n_threads() const { return state_.load(std::memory_order_acquire)->n_threads; }

// The workers of this process: a forked child makes its own. Where several of its threads come at
// once, the first one's stay. What the parent had is forgotten, see the destructor.
ThreadPool::State& ThreadPool::own_state() {
  State* state = state_.load(std::memory_order_acquire);
  if (state->owner == getpid()) return *state;
  auto fresh = std::make_unique<State>();
  fresh->cpus = state->cpus;
  fresh->n_threads = state->n_threads;
  fresh->spin_us = state->spin_us;
  fresh->start();
  if (state_.compare_exchange_strong(state, fresh.get())) return *fresh.release();
  fresh->finish();
  return *state;
}

void ThreadPool::run(int64_t n_chunks, Entry entry, const void* body) {
  if (n_chunks <= 0) return;
  State& s = own_state();
  const std::lock_guard lock(s.callers);
  if (n_chunks == 1 || s.n_threads == 1) {
    for (int64_t i = 0; i < n_chunks; ++i) entry(body, i, 0);
    return;
  }
  s.entry = entry;
  s.body = body;
  for (int64_t first = 0; first < n_chunks; first += kMaxChunks) {
    s.run_section(first, std::min(kMaxChunks, n_chunks - first));
  }
}

void ThreadPool::State::run_section(int64_t first, int64_t n_chunks) {
  first_chunk = first;
  done.store(0, std::memory_order_relaxed);
  const Ticket last{ticket.load(std::memory_order_relaxed)};
  ticket.store(Ticket::start(last.epoch() + 1, n_chunks), std::memory_order_release);
  caller_cpu.store(sched_getcpu(), std::memory_order_relaxed);
  wake.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers.load(std::memory_order_seq_cst) > 0) wake.notify_all();
  work(0, nullptr);
  wait_for(n_chunks);
}

// The rest is in the hands of workers that are at it now.
void ThreadPool::State::wait_for(int64_t n_chunks) {
  for (int i = 0; i < kCallerSpins; ++i) {
    if (done.load(std::memory_order_acquire) >= n_chunks) return;
    relax();
  }
  while (true) {
    caller_sleeps.store(1, std::memory_order_seq_cst);
    if (done.load(std::memory_order_seq_cst) >= n_chunks) break;
    caller_sleeps.wait(1, std::memory_order_seq_cst);
  }
  caller_sleeps.store(0, std::memory_order_relaxed);
}

RowSplit split_rows(int64_t n_rows, int n_threads, int64_t granule, int64_t min_rows) {
  // Eight chunks a thread: a thread that loses half its time holds up the rest by 1/16 at most.
  const int64_t wanted = n_threads > 1 ? int64_t{8} * n_threads : 1;
  int64_t rows = std::max((n_rows + wanted - 1) / wanted, min_rows);
  rows = (rows + granule - 1) / granule * granule;
  return {n_rows, std::max<int64_t>(rows, 1)};
}

}  // namespace mla::sys
