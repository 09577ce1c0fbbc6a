// The launch of matvec.cuh: one row of x with quantized weights.
#pragma once

#include "backends/cuda/packed.h"
#include "backends/cuda/product.h"

namespace mla::cuda {

inline constexpr int kMostMatVecWarps = 16;  // of a block

// Of a row's planes: where they begin in the row, and in a segment; bytes of a whole segment.
struct SegmentPlanes {
  int at[kMaxPlanes] = {}, stage_at[kMaxPlanes] = {}, bytes[kMaxPlanes] = {};
};

// Everything divided and looked up beforehand: the kernel's code has to be short.
struct MatVec {
  const float* x = nullptr;  // [n_x, k]; n_x: slots or 1
  int n_x = 1, k = 0;
  bool copies_x = false;  // to shared memory as it is, where there is room
  Norm norm;

  const std::byte* w[2] = {};  // of the second row of a pair: up, or the first once more
  int64_t matrix_stride = 0;   // bytes
  int64_t row_step = 0;        // from row to row; 0: all are the same
  int row_bytes = 0, n = 0;    // of a matrix
  SegmentPlanes planes;
  int n_segments = 1, n_pieces = 0;  // pieces: of 16 bytes, in a row's first plane

  const int32_t* ids = nullptr;    // [n_slots]; null: one matrix
  const float* weights = nullptr;  // [n_slots]; null: slots are not summed
  int64_t id_stride = 0, weight_stride = 0;
  int n_slots = 1, n_experts = 0;

  const float* residual = nullptr;  // [n]
  int64_t residual_step = 0;
  float* out = nullptr;  // [n_slots, n], or [n]
  bool swiglu = false, waits_last = false;

  // A pair is two rows of w, or a row of gate and one of up.
  int n_pairs = 0;  // of a slot
  int64_t pair_bytes = 0;
  int pairs_per_block = 0;  // where slots are summed
  int n_warps = 0;          // of a block
  int units_per_warp = 0;   // pairs
};

struct MatVecKernel {
  void (*kernel)(MatVec) = nullptr;  // null for plain formats
  SegmentPlanes (*planes)(int64_t n_blocks) = nullptr;
  int segment_blocks = 0;
  int block_pieces = 0;  // of 16 bytes, in the first plane of a block
  int warp_bytes = 0;    // of shared memory
};

// Bytes of a staged row of x: two a number, and eight for each sixteen.
constexpr int staged_bytes(int k) { return 2 * k + k / 16 * 8; }

bool matvec_fits(const Product& product, const DeviceInfo& device);
void run_matvec(const CudaRun& run, const Product& product);

}  // namespace mla::cuda
