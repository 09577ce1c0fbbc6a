// What the kernels of gemm.h share: which tile a block works on, which rows of the operands it
// has, and where results go.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "backends/cuda/kernels/intrinsics.cuh"

namespace mla::cuda {

// Both kinds of product. Rows are rows of a and c where offsets is null, else positions in the
// order of experts; matrices of b are batches or experts. Strides in elements.
struct GemmParams {
  int m, n, k;
  const void *a, *b, *b_up;
  int64_t lda, ldb, ldc;
  void* c;
  bool half_result;
  bool paired_stores;  // two adjacent columns of c and of the residual may be accessed at once
  const float *row_scale, *residual;
  int64_t ld_residual;
  const int* m_limit;
  int n_batch;
  int64_t batch_a, batch_b, batch_c, batch_scale, batch_residual;
  int n_split, k_split;
  float* partial;  // [n_split, n_batch, m, n] where n_split > 1
  const int *offsets, *sorted_pairs;
  int first_expert, n_experts, pairs_per_row;
  bool scatter;
};

struct Tile {
  int matrix;        // of b: batch or expert (counted from first_expert)
  int row, row_end;  // first row, and the end of the rows that belong to the matrix
  int column;        // of c
  int split, k_begin, k_end;
};

// The tiles of one launch, in an order in which blocks that run together share rows of a and b.
class TileMap {
 public:
  // Bytes of shared memory for `starts`, a multiple of 16.
  static constexpr int kSharedBytes = (512 + 1) * 4 + 12;

  // All threads of the block; grouped products keep the running count of row tiles in `starts`.
  __device__ TileMap(const GemmParams& p, int tile_m, int tile_n, int* starts)
      : p_(p),
        tile_m_(tile_m),
        columns_(p.b_up != nullptr ? tile_n / 2 : tile_n),
        tiles_n_((p.n + columns_ - 1) / columns_),
        starts_(starts) {
    if (p.offsets != nullptr) {
      if (threadIdx.x < 32) count_row_tiles();
      __syncthreads();
      n_tiles_ = starts_[p.n_experts] * tiles_n_;
      return;
    }
    m_ = p.m_limit != nullptr ? max(0, min(p.m, *p.m_limit)) : p.m;
    tiles_m_ = (m_ + tile_m - 1) / tile_m;
    n_tiles_ = tiles_m_ * tiles_n_ * p.n_batch * p.n_split;
  }

  __device__ int n_tiles() const { return n_tiles_; }
  __device__ Tile tile(int index) const {
    return p_.offsets != nullptr ? grouped(index) : dense(index);
  }

 private:
  // One warp: starts[e] = row tiles of the experts before e. A lane adds up 16 neighbours.
  __device__ void count_row_tiles() {
    const int lane = static_cast<int>(threadIdx.x);
    const int per_lane = (p_.n_experts + 31) / 32;
    const int begin = min(lane * per_lane, p_.n_experts);
    const int end = min(begin + per_lane, p_.n_experts);
    const int* offsets = p_.offsets + p_.first_expert;
    int sum = 0;
    for (int e = begin; e < end; ++e) {
      starts_[e] = sum;
      sum += (offsets[e + 1] - offsets[e] + tile_m_ - 1) / tile_m_;
    }
    int before = sum;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, step);
      if (lane >= step) before += other;
    }
    if (lane == 31) starts_[p_.n_experts] = before;
    before -= sum;
    for (int e = begin; e < end; ++e) starts_[e] += before;
  }

  // An expert's row tiles side by side: they share the tile of its matrix.
  __device__ Tile grouped(int index) const {
    const int row_tile = index / tiles_n_;
    int e = 0;
    for (int step = 256; step > 0; step /= 2) {
      if (e + step < p_.n_experts && starts_[e + step] <= row_tile) e += step;
    }
    const int local = index - starts_[e] * tiles_n_;
    const int n_rows = starts_[e + 1] - starts_[e];
    const int* offsets = p_.offsets + p_.first_expert + e;
    Tile t;
    t.matrix = e;
    t.row = offsets[0] + local % n_rows * tile_m_;
    t.row_end = offsets[1];
    t.column = local / n_rows * columns_;
    t.split = 0;
    t.k_begin = 0;
    t.k_end = p_.k;
    return t;
  }

  // Bands of 16 row tiles, column after column: the about 130 tiles in flight then read some
  // 16 tiles of a and 8 of b, near the least possible for their number.
  __device__ Tile dense(int index) const {
    constexpr int kBand = 16;
    const int per_matrix = tiles_m_ * tiles_n_;
    const int matrix = index / per_matrix;
    index -= matrix * per_matrix;
    const int band = index / (kBand * tiles_n_);
    const int band_rows = min(kBand, tiles_m_ - band * kBand);
    index -= band * kBand * tiles_n_;
    Tile t;
    t.matrix = matrix % p_.n_batch;
    t.split = matrix / p_.n_batch;
    t.row = (band * kBand + index % band_rows) * tile_m_;
    t.row_end = m_;
    t.column = index / band_rows * columns_;
    t.k_begin = t.split * p_.k_split;
    t.k_end = min(p_.k, t.k_begin + p_.k_split);
    return t;
  }

  const GemmParams& p_;
  int tile_m_, columns_, tiles_n_, n_tiles_;
  int m_ = 0, tiles_m_ = 0;
  int* starts_;
};

// The row of a, counted within its batch, that a row of the product reads.
__device__ inline int64_t row_of_a(const GemmParams& p, int row) {
  return p.pairs_per_row == 0 ? row : p.sorted_pairs[row] / p.pairs_per_row;
}

// Where the results of one row go.
struct OutRow {
  float scale;
  void* c;
  const float* residual;
  bool half;
};

__device__ inline OutRow out_row(const GemmParams& p, const Tile& t, int row) {
  OutRow out{1.0f, nullptr, nullptr, false};
  if (p.n_split > 1) {  // scaled and rounded when the parts are added
    const int64_t matrix = int64_t{t.split} * p.n_batch + t.matrix;
    out.c = p.partial + (matrix * p.m + row) * p.n;
    return out;
  }
  const bool grouped = p.offsets != nullptr;
  const int64_t batch = grouped ? 0 : t.matrix;
  const int64_t c_row = p.scatter ? p.sorted_pairs[row] : row;
  const int64_t at = batch * p.batch_c + c_row * p.ldc;
  if (p.row_scale != nullptr) {
    out.scale = p.row_scale[batch * p.batch_scale + row_of_a(p, row)];
  }
  out.half = p.half_result;
  if (out.half) {
    out.c = static_cast<__half*>(p.c) + at;
  } else {
    out.c = static_cast<float*>(p.c) + at;
  }
  if (p.residual != nullptr) {
    out.residual = p.residual + batch * p.batch_residual + c_row * p.ld_residual;
  }
  return out;
}

// Values are scaled already.
__device__ inline void store_one(const OutRow& out, int column, float value) {
  if (out.residual != nullptr) value += out.residual[column];
  if (out.half) {
    static_cast<__half*>(out.c)[column] = __float2half_rn(value);
  } else {
    static_cast<float*>(out.c)[column] = value;
  }
}

// The columns `column` (even) and the next one.
__device__ inline void store_pair(const GemmParams& p, const OutRow& out, int column, float v0,
                                  float v1) {
  if (column + 1 >= p.n || !p.paired_stores) {
    if (column < p.n) store_one(out, column, v0);
    if (column + 1 < p.n) store_one(out, column + 1, v1);
    return;
  }
  if (out.residual != nullptr) {
    const float2 r = *reinterpret_cast<const float2*>(out.residual + column);
    v0 += r.x;
    v1 += r.y;
  }
  if (out.half) {
    *reinterpret_cast<__half2*>(static_cast<__half*>(out.c) + column) = __floats2half2_rn(v0, v1);
  } else {
    *reinterpret_cast<float2*>(static_cast<float*>(out.c) + column) = make_float2(v0, v1);
  }
}

__device__ inline float swiglu(float gate, float up) {
  return __fdividef(gate, 1.0f + exp2_approx(-1.44269504f * gate)) * up;
}

}  // namespace mla::cuda
