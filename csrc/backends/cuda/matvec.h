// The launch of matvec.cuh: one row of x with quantized weights.
#pragma once

#include "backends/cuda/packed.h"
#include "backends/cuda/product.h"

namespace mla::cuda {

inline constexpr int kMatVecWarps = 8;
inline constexpr int kMatVecThreads = 32 * kMatVecWarps;

// Where the planes of a row begin.
struct PlanesAt {
  int at[kMaxPlanes] = {};
};

struct MatVec {
  Product product;
  Finish finish = Finish::store;
  bool fours = false;  // x may be read four neighbours at a time
  int n_x = 1;         // rows of x: one, or one for each slot
  int n_items = 0;     // of two rows of w, see matvec.cuh
  int items_per_slot = 0;
  int n_pieces = 0;  // of 16 bytes, in a row's first plane
  PlanesAt planes;
};

// Bytes of a staged row of x: two a number, and eight for each sixteen.
constexpr int staged_bytes(int k) { return 2 * k + k / 16 * 8; }

bool matvec_fits(const Product& product, const DeviceInfo& device);
void run_matvec(const CudaRun& run, const Product& product, Finish finish);

}  // namespace mla::cuda
