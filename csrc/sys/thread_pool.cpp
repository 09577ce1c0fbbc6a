#include "sys/thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

#include "base/error.h"
#include "sys/affinity.h"
#include "sys/core_sharing.h"
#include "sys/topology.h"

namespace mla::sys {
namespace {

// One 64-bit word says which run is on, how many chunks it has and which comes next. A chunk is
// claimed by compare-and-swap, so nobody can claim a chunk of a run that has ended.
constexpr int kCountBits = 22;
constexpr int64_t kMaxChunks = (int64_t{1} << kCountBits) - 1;
constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;
// Set where threads of other nodes may claim chunks too.
constexpr uint64_t kOpenBit = uint64_t{1} << 63;

// About 0.1 ms of looking whether the others are done, which is longer than most chunks. Who takes
// longer has lost its core; asleep, the caller leaves its own one to whoever needs it.
constexpr int kCallerSpins = 4096;

struct Ticket {
  uint64_t word;
  uint64_t epoch() const { return word >> (2 * kCountBits); }  // the open bit is its highest
  bool open() const { return (word & kOpenBit) != 0; }
  int64_t count() const { return static_cast<int64_t>((word >> kCountBits) & kCountMask); }
  int64_t next() const { return static_cast<int64_t>(word & kCountMask); }
  uint64_t next_run(int64_t count, bool open) const {
    const uint64_t next_epoch = ((epoch() + 1) << (2 * kCountBits)) & ~kOpenBit;
    return next_epoch | (static_cast<uint64_t>(count) << kCountBits) | (open ? kOpenBit : 0);
  }
};

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// What the threads of one node share: nothing here is written by those of another but to end a run
// or to help with chunks that are open to all.
struct alignas(64) ThreadPool::Node {
  std::vector<int> cpus;  // empty: any
  int64_t n_threads = 0;
  bool may_move = false;  // workers go where the caller is not

  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<uint32_t> wake{0};  // bumped with each run: sleepers wait for a change
  std::atomic<int> sleepers{0};
  int64_t first_chunk = 0;  // the ticket counts from here
};

namespace {

// Physical cores that the nodes have, or the process where there are none.
int cores_of(const std::vector<NodeShare>& nodes) {
  const int usable = usable_physical_cores();
  int64_t cores = 0;
  for (const NodeShare& node : nodes) cores += node.cpus.empty() ? 0 : node.weight;
  return nodes.empty() ? usable : static_cast<int>(std::min<int64_t>(usable, cores));
}

}  // namespace

struct ThreadPool::State {
  ThreadPoolOptions options;
  int n_threads = 1;
  std::vector<Node> nodes;
  std::vector<int> node_of;           // by thread
  std::vector<int64_t> node_threads;  // by node
  pid_t owner = 0;
  std::mutex callers;
  std::vector<std::thread> workers;

  std::atomic<bool> stop{false};
  alignas(64) std::atomic<uint32_t> caller_sleeps{0};
  std::atomic<int> caller_cpu{-1};  // where the caller was when the run began
  Entry entry = nullptr;
  const void* body = nullptr;

  explicit State(const ThreadPoolOptions& with);
  void assign();
  bool work(Node& node, int thread, CoreSharing* sharing, bool as_guest = false);
  bool help(const Node& own, int thread, CoreSharing* sharing);
  void loop(int thread);
  void start();
  void finish();
  void run_section(std::span<const int64_t> begins, std::span<const int64_t> ends, bool open);
  void wait_for(const Node& node, int64_t n_chunks);
};

ThreadPool::State::State(const ThreadPoolOptions& with)
    : options(with),
      n_threads(with.n_threads > 0 ? with.n_threads : cores_of(with.nodes)),
      nodes(std::max<size_t>(with.nodes.size(), 1)) {
  options.n_threads = n_threads;  // a forked child's threads index the same scratch
  assign();
}

// Which thread belongs to which node.
void ThreadPool::State::assign() {
  std::vector<int64_t> weights;
  for (const NodeShare& share : options.nodes) {
    weights.push_back(share.cpus.empty() ? 0 : share.weight);
  }
  if (weights.empty()) weights = {1};
  for (size_t i = 0; i < options.nodes.size(); ++i) nodes[i].cpus = options.nodes[i].cpus;
  const std::vector<int64_t> begins = split_rows_over_nodes(n_threads, weights);
  for (int thread = 0; thread < n_threads; ++thread) {
    size_t node = 0;
    while (thread >= begins[node + 1]) ++node;
    for (size_t i = 0; !options.cpus.empty() && i < nodes.size(); ++i) {
      const int cpu = options.cpus[static_cast<size_t>(thread) % options.cpus.size()];
      if (std::count(nodes[i].cpus.begin(), nodes[i].cpus.end(), cpu) == 0) continue;
      node = i;
      break;
    }
    node_of.push_back(static_cast<int>(node));
    ++nodes[node].n_threads;
  }
  const size_t n_usable = usable_cpus().size();
  for (Node& node : nodes) {
    const size_t n_cpus = node.cpus.empty() ? n_usable : node.cpus.size();
    node.may_move = options.cpus.empty() && static_cast<size_t>(node.n_threads) <= n_cpus;
    node_threads.push_back(node.n_threads);
  }
}

// Claims and runs the node's chunks until the current run has none left; a guest takes only what is
// open to all. True if it ran any.
bool ThreadPool::State::work(Node& node, int thread, CoreSharing* sharing, bool as_guest) {
  bool any = false;
  uint64_t word = node.ticket.load(std::memory_order_acquire);
  while (true) {
    Ticket now{word};
    if (now.next() >= now.count() || (as_guest && !now.open())) return any;
    if (sharing != nullptr) {
      sharing->between_chunks(caller_cpu.load(std::memory_order_relaxed));
      word = node.ticket.load(std::memory_order_acquire);
      now.word = word;
      if (now.next() >= now.count() || (as_guest && !now.open())) return any;
    }
    if (!node.ticket.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel,
                                           std::memory_order_acquire)) {
      continue;
    }
    entry(body, node.first_chunk + now.next(), thread);
    const int64_t n_done = node.done.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (n_done == now.count() && caller_sleeps.exchange(0, std::memory_order_seq_cst) != 0) {
      caller_sleeps.notify_one();
    }
    any = true;
    word = node.ticket.load(std::memory_order_acquire);
  }
}

bool ThreadPool::State::help(const Node& own, int thread, CoreSharing* sharing) {
  bool any = false;
  for (Node& node : nodes) {
    if (&node != &own) any = work(node, thread, sharing, true) || any;
  }
  return any;
}

void ThreadPool::State::loop(int thread) {
  Node& node = nodes[static_cast<size_t>(node_of[static_cast<size_t>(thread)])];
  const std::vector<int>& cpus = options.cpus;
  if (!cpus.empty()) {
    run_on({cpus[static_cast<size_t>(thread) % cpus.size()]});  // checked when the pool is made
  } else if (!node.cpus.empty()) {
    run_on(node.cpus);
  }
  CoreSharing sharing(node.may_move);
  while (true) {
    // Before `stop`, which is set before the last bump: whoever has seen that bump also sees it.
    const uint32_t seen = node.wake.load(std::memory_order_acquire);
    if (stop.load(std::memory_order_acquire)) return;
    if (work(node, thread, &sharing) || help(node, thread, &sharing)) continue;
    const auto until =
        std::chrono::steady_clock::now() + std::chrono::microseconds(options.spin_us);
    bool woken = false;
    while (!woken && std::chrono::steady_clock::now() < until) {
      for (int i = 0; i < 32; ++i) relax();
      woken = node.wake.load(std::memory_order_acquire) != seen;
    }
    if (woken) continue;
    node.sleepers.fetch_add(1, std::memory_order_seq_cst);
    node.wake.wait(seen, std::memory_order_seq_cst);
    node.sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
}

void ThreadPool::State::start() {
  owner = getpid();
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
  for (Node& node : nodes) {
    node.wake.fetch_add(1, std::memory_order_seq_cst);
    node.wake.notify_all();
  }
  for (std::thread& worker : workers) worker.join();
}

namespace {

void check_cpus(const std::vector<int>& cpus) {
  const std::vector<int> allowed = usable_cpus();
  for (int cpu : cpus) {
    MLA_CHECK(DeviceError, std::binary_search(allowed.begin(), allowed.end(), cpu),
              "thread pool: CPU ", cpu, " is not among those this process may use");
  }
}

void check_nodes(const std::vector<NodeShare>& nodes) {
  if (nodes.empty()) return;
  MLA_CHECK(DeviceError, nodes.size() <= kMaxNodes, "thread pool: ", nodes.size(),
            " nodes, accepted are at most ", kMaxNodes);
  const bool any = std::any_of(nodes.begin(), nodes.end(), [](const NodeShare& node) {
    return !node.cpus.empty() && node.weight > 0;
  });
  MLA_CHECK(DeviceError, any, "thread pool: no node has CPUs");
  for (const NodeShare& node : nodes) check_cpus(node.cpus);
}

}  // namespace

ThreadPool::ThreadPool(const ThreadPoolOptions& options) {
  check_cpus(options.cpus);
  check_nodes(options.nodes);
  MLA_CHECK(ShapeError, options.n_threads >= 0 && options.n_threads <= 4096,
            "thread pool: ", options.n_threads, " threads, accepted is 0 (automatic) to 4096");
  auto state = std::make_unique<State>(options);
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

const ThreadPool::State& ThreadPool::state() const {
  return *state_.load(std::memory_order_acquire);
}
int ThreadPool::n_threads() const { return state().n_threads; }
int ThreadPool::n_nodes() const { return static_cast<int>(state().nodes.size()); }
int ThreadPool::node_of(int thread) const { return state().node_of[static_cast<size_t>(thread)]; }
const std::vector<NodeShare>& ThreadPool::nodes() const { return state().options.nodes; }
std::span<const int64_t> ThreadPool::node_threads() const { return state().node_threads; }
const std::vector<int>& ThreadPool::caller_cpus() const {
  return state().nodes[static_cast<size_t>(node_of(0))].cpus;
}

// The workers of this process: a forked child makes its own. Where several of its threads come at
// once, the first one's stay. What the parent had is forgotten, see the destructor.
ThreadPool::State& ThreadPool::own_state() {
  State* state = state_.load(std::memory_order_acquire);
  if (state->owner == getpid()) return *state;
  auto fresh = std::make_unique<State>(state->options);
  fresh->start();
  if (state_.compare_exchange_strong(state, fresh.get())) return *fresh.release();
  fresh->finish();
  return *state;
}

void ThreadPool::run(int64_t n_chunks, std::span<const int64_t> begins, Entry entry,
                     const void* body) {
  if (n_chunks <= 0) return;
  State& s = own_state();
  const std::lock_guard lock(s.callers);
  const size_t n_nodes = s.nodes.size();
  const bool open = n_nodes == 1 || begins.size() != n_nodes + 1;
  if (s.n_threads == 1 || (n_chunks == 1 && open)) {
    for (int64_t i = 0; i < n_chunks; ++i) entry(body, i, 0);
    return;
  }
  s.entry = entry;
  s.body = body;
  std::array<int64_t, kMaxNodes + 1> ends;
  if (n_nodes == 1) {
    ends[0] = 0;
    ends[1] = n_chunks;
  } else if (open) {
    split_rows_over_nodes(n_chunks, s.node_threads, 1, std::span(ends).first(n_nodes + 1));
  } else {
    std::copy(begins.begin(), begins.end(), ends.begin());
  }
  std::array<int64_t, kMaxNodes> next;
  std::copy_n(ends.begin(), n_nodes, next.begin());
  std::copy_n(ends.begin() + 1, n_nodes, ends.begin());
  std::array<int64_t, kMaxNodes> until;
  for (bool more = true; more;) {
    more = false;
    for (size_t i = 0; i < n_nodes; ++i) {
      until[i] = std::min(ends[i], next[i] + kMaxChunks);
      more = more || until[i] < ends[i];
    }
    s.run_section(std::span(next).first(n_nodes), std::span(until).first(n_nodes), open);
    next = until;
  }
}

// Chunks [begins[i], ends[i]) of every node i.
void ThreadPool::State::run_section(std::span<const int64_t> begins, std::span<const int64_t> ends,
                                    bool open) {
  for (size_t i = 0; i < nodes.size(); ++i) {
    nodes[i].first_chunk = begins[i];
    nodes[i].done.store(0, std::memory_order_relaxed);
  }
  caller_cpu.store(sched_getcpu(), std::memory_order_relaxed);
  bool help_wanted = false;
  for (size_t i = 0; i < nodes.size(); ++i) {
    Node& node = nodes[i];
    const int64_t n_chunks = ends[i] - begins[i];
    const Ticket last{node.ticket.load(std::memory_order_relaxed)};
    const bool to_all = nodes.size() > 1 && (open || node.n_threads == 0);
    help_wanted = help_wanted || (to_all && n_chunks > 0);
    node.ticket.store(last.next_run(n_chunks, to_all), std::memory_order_release);
  }
  for (size_t i = 0; i < nodes.size(); ++i) {
    Node& node = nodes[i];
    if (node.n_threads == 0 || (begins[i] == ends[i] && !help_wanted)) continue;
    node.wake.fetch_add(1, std::memory_order_seq_cst);
    if (node.sleepers.load(std::memory_order_seq_cst) > 0) node.wake.notify_all();
  }
  Node& own = nodes[static_cast<size_t>(node_of[0])];
  work(own, 0, nullptr);
  if (help_wanted) help(own, 0, nullptr);
  for (size_t i = 0; i < nodes.size(); ++i) wait_for(nodes[i], ends[i] - begins[i]);
}

// The rest is in the hands of workers that are at it now.
void ThreadPool::State::wait_for(const Node& node, int64_t n_chunks) {
  for (int i = 0; i < kCallerSpins; ++i) {
    if (node.done.load(std::memory_order_acquire) >= n_chunks) return;
    relax();
  }
  while (true) {
    caller_sleeps.store(1, std::memory_order_seq_cst);
    if (node.done.load(std::memory_order_seq_cst) >= n_chunks) break;
    caller_sleeps.wait(1, std::memory_order_seq_cst);
  }
  caller_sleeps.store(0, std::memory_order_relaxed);
}

}  // namespace mla::sys
