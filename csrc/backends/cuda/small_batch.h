// The launch of small_batch.cuh: what its kernels are given, and the table of kernels per format.
#pragma once

#include "backends/cuda/product.h"
#include "backends/cuda/row_layout.h"

namespace mla::cuda {

inline constexpr int kSmallBatchWarps = 8;
inline constexpr int kSmallBatchThreads = 32 * kSmallBatchWarps;
inline constexpr int kMaxSmallRows = 64;     // of one matrix: 8 tiles of 8 columns
inline constexpr int kMaxRoutedPairs = 512;  // that a block finds its own among: 2 each thread
inline constexpr int kMaxSlots = 64;         // experts of a token, summed by one block

// What the blocks of a range of w's rows have in common.
enum class Jobs : uint8_t {
  matrices,  // one matrix, all rows that meet it
  pairs,     // one routed row
  experts,   // one expert, all rows routed to it
  sums,      // one token, all its experts, summed
};

struct SmallBatch {
  Product product;
  Jobs jobs = Jobs::matrices;
  Finish finish = Finish::store;
  int n_segments = 1;  // matrices that follow each other: 2 for a swiglu, the slots of a sum
  int n_units = 0;     // of k
  int split = 1;       // warps that divide k
  int blocks_per_job = 1, rows_per_block = 0;  // rows of w
  bool fours = false;                          // x may be read four neighbours at a time
  // Rows staged by a kernel before; null: each block stages its own at x_at of its memory.
  const std::byte* staged = nullptr;
  const float* scales = nullptr;
  int pitch = 0;
  int x_at = 0, parts_at = 0;  // in shared memory, bytes
};

// Stages of a warp's ring: those that fit 76 KiB, so that two blocks with their rows of x share the
// 227 KiB of a multiprocessor; devices before 8.0 copy at once and have 64 KiB.
constexpr int stages_of(int stage_bytes, int capability) {
  if (capability < 80) return 2;
  const int fit = 76 * 1024 / (kSmallBatchWarps * stage_bytes);
  return fit < 2 ? 2 : fit > 4 ? 4 : fit;
}

// The warps that divide k, n_units of it: as many as have equal shares, within a tenth.
constexpr int split_of(int n_units) {
  int best = 1;
  for (int split = 1; split <= kSmallBatchWarps; split *= 2) {
    const int turns = (n_units + split - 1) / split;
    if (10 * n_units >= 9 * split * turns) best = split;
  }
  return best;
}

bool small_batch_fits(const Product& product, const DeviceInfo& device);
size_t small_batch_scratch_bytes(const Product& product, const DeviceInfo& device);
void run_small_batch(const CudaRun& run, const Product& product, Finish finish);

}  // namespace mla::cuda
