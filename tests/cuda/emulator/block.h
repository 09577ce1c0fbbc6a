// One block of threads at a time, all of them on one thread of the host.
//
// A thread runs until it meets others: at a collective of its warp or at a barrier of its block.
// The last to arrive does the work for all and goes on; the others become ready. When none is ready
// and some have not ended, they wait for something that will never come, and the launch fails.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace mla::emulator {

struct Launch {
  const void* kernel = nullptr;
  uint3 grid = {1, 1, 1};
  uint3 block = {1, 1, 1};
  size_t dynamic_smem_bytes = 0;
  size_t smem_limit_bytes = 0;  // of a block
  std::function<void()> body;   // what each thread runs
};

// Runs the grid, block after block. Throws DeviceError where the kernel does what it must not.
void run(const Launch& launch);

// ---- for the threads of a block -----------------------------------------------------------------

// Ends the launch with an error that names the kernel and the thread.
[[noreturn]] void fail(const std::string& what);

// operands: of the 32 lanes, null where the lane takes no part. lanes: who does.
using Resolve = void (*)(void* const* operands, uint32_t lanes);
// Meets the lanes of `mask` that have not ended. `name` is for messages.
void collective(uint32_t mask, void* operand, Resolve resolve, const char* name);

// n_threads 0: all of the block that have not ended. waits false: only counts.
void barrier(int id, int n_threads, bool waits);

// Lets the others go first, for loops that wait for them.
void yield();

void note_pdl_wait();
uint32_t alive_lanes();
std::byte* dynamic_memory();

// Copies that are made when they are waited for. Until then the destination holds rubbish.
void copy_later(void* smem, const void* global, size_t bytes, bool valid);
void commit_copies();
void wait_copies(size_t n_groups_left);

}  // namespace mla::emulator

// The registers of the thread that runs.
extern __attribute__((visibility("hidden"))) uint3 threadIdx;
extern __attribute__((visibility("hidden"))) uint3 blockIdx;
extern __attribute__((visibility("hidden"))) dim3 blockDim;
extern __attribute__((visibility("hidden"))) dim3 gridDim;
inline constexpr int warpSize = 32;
