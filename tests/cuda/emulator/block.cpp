#include "emulator/block.h"

#include <bit>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "emulator/copies.h"
#include "emulator/device.h"
#include "emulator/devices.h"
#include "emulator/faults.h"
#include "emulator/fiber.h"
#include "emulator/limits.h"
#include "emulator/shared_memory.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace mla::emulator {
namespace {

constexpr int kLanes = 32;
constexpr int kMaxWarps = kMaxThreads / kLanes;
constexpr int kBarriers = 16;
constexpr size_t kDynamicLimitBytes = 227 * 1024;
// A thread that still yields after this many others' turns waits for what will never come.
constexpr int kIdleRounds = 10000;
constexpr size_t kCanaryBytes = 1024;
constexpr size_t kDynamicAlignment = 1024;
// Not a number in every float format, far out of range as an index.
constexpr int kRubbish = 0xff;

struct Arrival {
  uint32_t mask = 0;
  Resolve resolve = nullptr;
  const char* name = "";
};

struct Warp {
  uint32_t alive = 0;
  uint32_t ready = 0;
  uint32_t yielded = 0;  // can run, once no other can
  uint32_t waiting = 0;  // at a collective
  void* operands[kLanes] = {};
  Arrival arrivals[kLanes];
};

struct Barrier {
  int arrived = 0;
  int expected = 0;  // 0: all threads that have not ended
  uint32_t waiting[kMaxWarps] = {};
};

struct Block {
  const Launch* launch = nullptr;
  KernelSymbols symbols;
  int n_threads = 0, n_alive = 0;
  int current = 0;
  bool reverse = false;
  bool pdl_waited = false;
  uint32_t ready_warps = 0;
  int n_idle_rounds = 0;  // of yields only
  Warp warps[kMaxWarps];
  Barrier barriers[kBarriers];
  Context contexts[kMaxThreads] = {};
  uint3 index[kMaxThreads];
  Copies copies[kMaxThreads];
  Context host = nullptr;
  std::string error;
  std::unique_ptr<std::byte[]> memory{
      new std::byte[kDynamicLimitBytes + kDynamicAlignment + 2 * kCanaryBytes]};
  std::byte* dynamic = nullptr;
};

std::mutex one_at_a_time;
Block* block = nullptr;  // that of the launch under way

Warp& warp_of(int thread) { return block->warps[thread / kLanes]; }
uint32_t bit_of(int thread) { return 1u << (thread % kLanes); }

int pick(uint32_t mask) {
  return block->reverse ? 31 - std::countl_zero(mask) : std::countr_zero(mask);
}

void set_ready(int warp, uint32_t lanes) {
  block->warps[warp].ready |= lanes;
  if (lanes != 0) block->ready_warps |= 1u << warp;
}

// Those that yielded are ready again.
void end_round() {
  for (int warp = 0; warp * kLanes < block->n_threads; ++warp) {
    set_ready(warp, std::exchange(block->warps[warp].yielded, 0));
  }
  ++block->n_idle_rounds;
}

// The next thread to run, out of those that are ready; -1: none is.
int take_ready() {
  int warp = block->current / kLanes;
  if (block->warps[warp].ready == 0) {
    if (block->ready_warps == 0) end_round();
    if (block->ready_warps == 0 || block->n_idle_rounds > kIdleRounds) return -1;
    warp = pick(block->ready_warps);
  }
  uint32_t& ready = block->warps[warp].ready;
  const int lane = pick(ready);
  ready &= ~(1u << lane);
  if (ready == 0) block->ready_warps &= ~(1u << warp);
  return warp * kLanes + lane;
}

std::string thread_list(uint32_t lanes, int warp) {
  std::string text;
  int n_shown = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1u) == 0) continue;
    if (++n_shown > 4) return text + ", ...";
    text += (text.empty() ? "" : ", ") + std::to_string(warp * kLanes + lane);
  }
  return text;
}

std::string who_waits() {
  std::string text;
  for (int warp = 0; warp < kMaxWarps; ++warp) {
    const Warp& w = block->warps[warp];
    if (w.yielded != 0) {
      text += concat("\n  threads ", thread_list(w.yielded | w.ready, warp), " wait in a loop");
    }
    if (w.waiting != 0) {
      text += concat("\n  threads ", thread_list(w.waiting, warp), " wait in ",
                     w.arrivals[std::countr_zero(w.waiting)].name);
    }
    for (int id = 0; id < kBarriers; ++id) {
      const Barrier& b = block->barriers[id];
      if (b.waiting[warp] == 0) continue;
      text += concat("\n  threads ", thread_list(b.waiting[warp], warp), " wait at barrier ", id,
                     ", where ", b.arrived, " of ", b.expected == 0 ? block->n_alive : b.expected,
                     " are");
    }
  }
  return text;
}

void leave() {
  Context abandoned = block->contexts[block->current];
  switch_context(&abandoned, block->host);
}

// The next one that is ready, counted on from the running thread: nobody is passed over for ever.
int take_ready_in_turn() {
  for (int i = 1; i <= block->n_threads; ++i) {
    const int thread = (block->current + i) % block->n_threads;
    uint32_t& ready = warp_of(thread).ready;
    if ((ready & bit_of(thread)) == 0) continue;
    ready &= ~bit_of(thread);
    if (ready == 0) block->ready_warps &= ~(1u << (thread / kLanes));
    return thread;
  }
  return -1;
}

// Suspends the running thread, which is `ready` or waits for something.
void run_another(int next) {
  const int self = block->current;
  if (next < 0) fail("the block is stuck:" + who_waits());
  if (next == self) return;
  block->current = next;
  threadIdx = block->index[next];
  switch_context(&block->contexts[self], block->contexts[next]);
}

// Resolves the collective of `mask`, if all of its lanes have come.
bool resolve_if_complete(Warp& w, int warp, const Arrival& arrival) {
  const uint32_t lanes = arrival.mask & w.alive;
  if ((w.waiting & lanes) != lanes) return false;
  void* operands[kLanes] = {};
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const Arrival& other = w.arrivals[lane];
    if (other.mask != arrival.mask || other.resolve != arrival.resolve) {
      fail(concat("lanes of warp ", warp, " meet in different collectives: ", arrival.name,
                  " of mask ", arrival.mask, ", and lane ", lane, " in ", other.name, " of mask ",
                  other.mask));
    }
    operands[lane] = w.operands[lane];
  }
  w.waiting &= ~lanes;
  arrival.resolve(operands, lanes);
  block->n_idle_rounds = 0;
  set_ready(warp, lanes);
  return true;
}

bool release_if_complete(Barrier& b) {
  if (b.arrived < (b.expected == 0 ? block->n_alive : b.expected)) return false;
  for (int warp = 0; warp < kMaxWarps; ++warp) {
    set_ready(warp, b.waiting[warp]);
    b.waiting[warp] = 0;
  }
  b.arrived = 0;
  block->n_idle_rounds = 0;
  return true;
}

// The others no longer wait for this thread.
void end_thread() {
  const int self = block->current;
  Warp& w = warp_of(self);
  w.alive &= ~bit_of(self);
  --block->n_alive;
  block->n_idle_rounds = 0;
  for (uint32_t left = w.waiting; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    if ((w.waiting >> lane & 1u) != 0)
      (void)resolve_if_complete(w, self / kLanes, w.arrivals[lane]);
  }
  for (Barrier& b : block->barriers) {
    if (b.arrived > 0 && b.expected == 0) (void)release_if_complete(b);
  }
  if (block->n_alive == 0) leave();
  run_another(take_ready());
}

void thread_main() {
  block->launch->body();
  end_thread();
}

void poison() {
  for (const SharedVariable& variable : block->symbols.shared) {
    std::memset(variable.data, kRubbish, variable.bytes);
  }
  std::memset(block->dynamic - kCanaryBytes, kRubbish,
              block->launch->dynamic_smem_bytes + 2 * kCanaryBytes);
}

bool canaries_live() {
  for (size_t i = 1; i <= kCanaryBytes; ++i) {
    const std::byte* end = block->dynamic + block->launch->dynamic_smem_bytes;
    if (*(block->dynamic - i) != std::byte{kRubbish} || end[i - 1] != std::byte{kRubbish}) {
      return false;
    }
  }
  return true;
}

void start_block(Stacks& stacks) {
  const int n = block->n_threads;
  block->n_alive = n;
  block->ready_warps = 0;
  block->n_idle_rounds = 0;
  block->pdl_waited = false;
  for (Barrier& b : block->barriers) b = {};
  for (int warp = 0; warp * kLanes < n; ++warp) {
    const int n_lanes = n - warp * kLanes;
    Warp& w = block->warps[warp];
    w.alive = n_lanes >= kLanes ? ~0u : (1u << n_lanes) - 1;
    w.ready = w.waiting = w.yielded = 0;
    set_ready(warp, w.alive);
  }
  for (int i = 0; i < n; ++i) {
    block->contexts[i] = stacks.prepare(i, thread_main);
    block->copies[i].clear();
  }
  block->current = block->reverse ? n - 1 : 0;
}

void run_block(Stacks& stacks) {
  poison();
  start_block(stacks);
  block->current = take_ready();
  threadIdx = block->index[block->current];
  switch_context(&block->host, block->contexts[block->current]);
  if (block->error.empty() && !block->pdl_waited) {
    block->error = "a block ended and none of its threads has called pdl_wait()";
  }
  if (block->error.empty() && !canaries_live()) {
    block->error = "a block wrote outside its dynamic shared memory";
  }
  MLA_CHECK(DeviceError, block->error.empty(), "emulator: ", block->symbols.name, ", block (",
            blockIdx.x, ", ", blockIdx.y, ", ", blockIdx.z, "): ", block->error);
}

Block& prepare(const Launch& launch, KernelSymbols symbols) {
  static Block the_block;
  Block& b = the_block;
  b.launch = &launch;
  b.symbols = std::move(symbols);
  b.error.clear();
  const char* order = std::getenv("MLA_EMULATOR_ORDER");
  b.reverse = order != nullptr && std::string_view(order) == "reverse";
  auto start = reinterpret_cast<uintptr_t>(b.memory.get()) + kCanaryBytes;
  start = (start + kDynamicAlignment - 1) / kDynamicAlignment * kDynamicAlignment;
  b.dynamic = reinterpret_cast<std::byte*>(start);
  b.n_threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  for (int i = 0; i < b.n_threads; ++i) {
    const auto at = static_cast<unsigned>(i);
    b.index[i] = {at % launch.block.x, at / launch.block.x % launch.block.y,
                  at / launch.block.x / launch.block.y};
  }
  return b;
}

}  // namespace

void run(const Launch& launch) {
  const std::lock_guard lock(one_at_a_time);
  static Stacks stacks;
  KernelSymbols symbols = find_symbols(launch.kernel);
  note_launch(symbols.name);
  check_limits(launch, symbols);
  block = &prepare(launch, std::move(symbols));
  const FaultReport report(block->symbols.name.c_str());
  blockDim = dim3(launch.block.x, launch.block.y, launch.block.z);
  gridDim = dim3(launch.grid.x, launch.grid.y, launch.grid.z);
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block(stacks);
    }
  }
}

void fail(const std::string& what) {
  block->error = concat("thread ", block->current, ": ", what);
  leave();
  __builtin_unreachable();
}

void collective(uint32_t mask, void* operand, Resolve resolve, const char* name) {
  const int self = block->current;
  Warp& w = warp_of(self);
  const uint32_t bit = bit_of(self);
  if ((mask & bit) == 0) fail(concat(name, ": the calling lane is not in its mask"));
  w.operands[self % kLanes] = operand;
  w.arrivals[self % kLanes] = {mask, resolve, name};
  w.waiting |= bit;
  if (resolve_if_complete(w, self / kLanes, {mask, resolve, name})) {
    w.ready &= ~bit;
    if (w.ready == 0) block->ready_warps &= ~(1u << (self / kLanes));
    return;
  }
  run_another(take_ready());
}

void barrier(int id, int n_threads, bool waits) {
  if (id < 0 || id >= kBarriers) fail(concat("there is no barrier ", id));
  if (n_threads % kLanes != 0) {
    fail(concat("barrier ", id, " of ", n_threads, " threads: not whole warps"));
  }
  Barrier& b = block->barriers[id];
  if (b.arrived > 0 && b.expected != n_threads) {
    fail(concat("barrier ", id, " of ", n_threads, " threads: others expect ", b.expected));
  }
  const int self = block->current;
  b.expected = n_threads;
  ++b.arrived;
  if (release_if_complete(b) || !waits) return;
  b.waiting[self / kLanes] |= bit_of(self);
  run_another(take_ready());
}

void yield() {
  set_ready(block->current / kLanes, bit_of(block->current));
  run_another(take_ready_in_turn());
}

int block_reduce(int value, int (*combine)(int, int)) {
  static int values[kMaxThreads];
  const int self = block->current;
  values[self] = value;
  barrier(0, 0, true);
  bool first = true;
  int total = 0;
  for (int i = 0; i < block->n_threads; ++i) {
    if ((warp_of(i).alive & bit_of(i)) == 0) continue;
    total = first ? values[i] : combine(total, values[i]);
    first = false;
  }
  barrier(0, 0, true);
  return total;
}

void note_pdl_wait() { block->pdl_waited = true; }
uint32_t alive_lanes() { return warp_of(block->current).alive; }
std::byte* dynamic_memory() { return block->dynamic; }

void copy_later(void* smem, const void* global, size_t bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(smem) % bytes != 0) fail("cp_async: unaligned shared memory");
  if (valid && reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fail("cp_async: unaligned global memory");
  }
  const auto* at = static_cast<std::byte*>(smem);
  const std::byte* end = block->dynamic + block->launch->dynamic_smem_bytes;
  if (at < end + kCanaryBytes && at + bytes > end) fail("cp_async: past dynamic shared memory");
  block->copies[block->current].add(smem, valid ? global : nullptr, bytes);
  std::memset(smem, kRubbish, bytes);
}

void commit_copies() { block->copies[block->current].commit(); }
void wait_copies(size_t n_groups_left) { block->copies[block->current].wait(n_groups_left); }

}  // namespace mla::emulator
