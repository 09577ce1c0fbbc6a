// Products of one row of x with quantized weights: what a decoded token is made of.
//
//   out[n] = sum_k w[n][k] x[k]
//
// Shapes and cases: product.h, one token: a matrix; the experts of a token; these summed. A warp
// takes two rows of w at a time (those of gate and up for a swiglu), its lanes their 16-byte pieces
// in turn. x is staged once per block as 16-bit integers with a scale for each 16 neighbours, in
// two bytes, so that products are those of dp4a: x = scale * (256 high + low). Sums of x times the
// minima of the weights go with them.
//
// Why not tensor cores: at one row they would multiply seven columns of nothing, and their code is
// long. A decoded token runs 500 kernels once each: instructions come from L2, and a kernel that
// unrolls them waits for them longer than for its weights. The loops here stay short.
//
// Instructions: two dp4a for a word of four weights, and what unpacks it. 16 cycles of a
// multiprocessor bring the bytes of 468 weights of 4.5 bits at 4.3 TB/s, and issue 2,048 lanes'
// instructions, 4.4 a weight.
// Registers: at most 85, so that two blocks leave a third of a multiprocessor to the next kernel's,
// which fetches its first weights into L2 while this one ends. Error: x is rounded to 2^-16 of the
// largest of its 16; all else is exact or float32.
#pragma once

#include "backends/cuda/kernels/pieces.cuh"
#include "backends/cuda/kernels/product_rows.cuh"
#include "backends/cuda/product_kernels.h"

namespace mla::cuda {

namespace matvec {

// Rows of x in shared memory, each as [high: k][low: k][scale and sum: k / 16].
struct StagedX {
  const std::byte* high;
  const std::byte* low;
  const float2* factors;
};

__device__ __forceinline__ StagedX staged_row(std::byte* smem, int row, int k) {
  std::byte* at = smem + static_cast<int64_t>(row) * staged_bytes(k);
  return {at, at + k, reinterpret_cast<const float2*>(at + 2 * k)};
}

inline constexpr float kLargest = 32512.0f;  // 127 * 256: the high byte stays within its 8 bits

// Sixteen neighbours of a row of x, with one thread.
__device__ __forceinline__ void stage_sixteen(const Product& p, const std::byte* row, bool fours,
                                              int k, std::byte* high, std::byte* low,
                                              float2* factors) {
  float v[16];
  float largest = 0.0f;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::byte* from = row + (k + 4 * i) * p.x_step;
    Four f;
    if (fours) {
      f = load_four(from, p.x_format);
    } else {
      for (int j = 0; j < 4; ++j) f.at[j] = load_element(from + j * p.x_step, p.x_format);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[4 * i + j] = f.at[j];
      largest = fmaxf(largest, fabsf(f.at[j]));
      finite = finite && fabsf(f.at[j]) < INFINITY;
    }
  }
  // Below, the inverse would overflow; such numbers add nothing that float32 sums keep.
  const float inverse = largest > 1e-30f && finite ? kLargest / largest : 0.0f;
  const float scale = !finite ? NAN : inverse > 0.0f ? largest / kLargest : 0.0f;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t highs = 0, lows = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int q = __float2int_rn(v[4 * i + j] * inverse);
      const int top = (q + 128) >> 8;
      highs |= (static_cast<uint32_t>(top) & 255u) << (8 * j);
      lows |= (static_cast<uint32_t>(q - 256 * top) & 255u) << (8 * j);
      sum += q;
    }
    reinterpret_cast<uint32_t*>(high + k)[i] = highs;
    reinterpret_cast<uint32_t*>(low + k)[i] = lows;
  }
  factors[k / 16] = {scale, scale * static_cast<float>(sum)};
}

// Rows first .. first + n_rows of x, all threads.
__device__ __forceinline__ void stage(const MatVec& m, std::byte* smem) {
  const Product& p = m.product;
  const int sixteens = p.k / 16;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < m.n_x * sixteens; i += kMatVecThreads) {
    const int row = i / sixteens;
    std::byte* at = smem + static_cast<int64_t>(row) * staged_bytes(p.k);
    stage_sixteen(p, x_row(p, row), m.fours, i % sixteens * 16, at, at + p.k,
                  reinterpret_cast<float2*>(at + 2 * p.k));
  }
  __syncthreads();
}

// ---- products -----------------------------------------------------------------------------------

template <Format F, int part>
__device__ __forceinline__ void add_part(const Piece<F> (&pieces)[2], const StagedX& x, int piece,
                                         float (&sums)[2]) {
  const int k = Piece<F>::k(piece, part);
  const uint4 high = *reinterpret_cast<const uint4*>(x.high + k);
  const uint4 low = *reinterpret_cast<const uint4*>(x.low + k);
  const float2 factor = x.factors[k / 16];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int top = 0, bottom = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int w = pieces[r].template word<part>(j);
      top = dp4a(w, static_cast<int>(pieces::word(high, j)), top);
      bottom = dp4a(w, static_cast<int>(pieces::word(low, j)), bottom);
    }
    const float2 scale = pieces[r].template scale_min<part>();
    sums[r] = fmaf(scale.x * factor.x, static_cast<float>(256 * top + bottom), sums[r]);
    sums[r] = fmaf(-scale.y, factor.y, sums[r]);
  }
}

// sums[r] += the lane's share of row r times x.
template <Format F>
__device__ __forceinline__ void add_rows(const MatVec& m, const std::byte* const (&rows)[2],
                                         const StagedX& x, float (&sums)[2]) {
#pragma unroll 2
  for (int piece = lane_id(); piece < m.n_pieces; piece += kWarpThreads) {
    Piece<F> pieces[2];
    pieces[0].load(rows[0], m.planes, piece);
    pieces[1].load(rows[1], m.planes, piece);
    add_part<F, 0>(pieces, x, piece, sums);
    if constexpr (Piece<F>::kParts > 1) add_part<F, 1>(pieces, x, piece, sums);
    if constexpr (Piece<F>::kParts > 2) {
      add_part<F, 2>(pieces, x, piece, sums);
      add_part<F, 3>(pieces, x, piece, sums);
    }
  }
}

// What a warp does at a time: a row of gate and up, or two rows of one matrix; of one slot or all.
struct Item {
  int slot;  // 0 where all are summed
  int n;     // first row of w
};

__device__ __forceinline__ Item item_at(const MatVec& m, int i) {
  const int slot = m.product.summed ? 0 : i / m.items_per_slot;
  return {slot, (i - slot * m.items_per_slot) * (m.product.swiglu ? 1 : 2)};
}

__device__ __forceinline__ void rows_of(const MatVec& m, int n, int expert,
                                        const std::byte* (&rows)[2]) {
  const Product& p = m.product;
  rows[0] = expert_matrix(p.w, expert) + n * p.w.row_stride;
  rows[1] = p.swiglu ? expert_matrix(p.up, expert) + n * p.up.row_stride
                     : rows[0] + (n + 1 < p.n ? p.w.row_stride : 0);
}

__device__ __forceinline__ void finish(const MatVec& m, const Item& item, const float (&sums)[2]) {
  const Product& p = m.product;
  const float a = warp_sum(sums[0]), b = warp_sum(sums[1]);
  if (p.swiglu) {
    if (lane_id() == 0) finish_product(p, m.finish, item.slot, item.n, silu_exact(a) * b);
  } else if (lane_id() < 2 && item.n + lane_id() < p.n) {
    finish_product(p, m.finish, item.slot, item.n + lane_id(), lane_id() == 0 ? a : b);
  }
}

// Weights do not wait for the kernels before: the warp's first rows come as far as L2.
__device__ __forceinline__ void fetch_ahead(const MatVec& m, int warp, int n_warps) {
  constexpr int kLine = 128, kItems = 4;
  const int row_bytes = static_cast<int>(m.product.w.row_stride);
#pragma unroll 1
  for (int i = 0; i < kItems && warp + i * n_warps < m.n_items; ++i) {
    const std::byte* rows[2];
    rows_of(m, item_at(m, warp + i * n_warps).n, 0, rows);
    for (int at = lane_id() * kLine; at < row_bytes; at += kWarpThreads * kLine) {
      prefetch_l2(rows[0] + at);
      prefetch_l2(rows[1] + at);
    }
  }
}

}  // namespace matvec

template <Format F>
__global__ void __launch_bounds__(kMatVecThreads, 3) matvec_kernel(MatVec m) {
  using namespace matvec;
  const Product& p = m.product;
  std::byte* smem = dynamic_smem();
  const int warp = static_cast<int>(blockIdx.x) * kMatVecWarps + warp_id();
  const int n_warps = static_cast<int>(gridDim.x) * kMatVecWarps;
  pdl_trigger();
  if (!p.routed) fetch_ahead(m, warp, n_warps);
  pdl_wait();
  stage(m, smem);
#pragma unroll 1
  for (int i = warp; i < m.n_items; i += n_warps) {
    const Item item = item_at(m, i);
    const int n_slots = p.summed ? p.n_slots : 1;
    float totals[2] = {0.0f, 0.0f};
#pragma unroll 1
    for (int s = 0; s < n_slots; ++s) {
      const int slot = item.slot + s;
      const int expert = p.routed ? expert_of(p, slot) : 0;
      float factor = p.summed ? weight_of(p, slot) : 1.0f;
      if (expert < 0) factor = NAN;
      const std::byte* rows[2];
      rows_of(m, item.n, expert, rows);
      float sums[2] = {0.0f, 0.0f};
      add_rows<F>(m, rows, staged_row(smem, m.n_x > 1 ? slot : 0, p.k), sums);
      totals[0] = fmaf(factor, sums[0], totals[0]);
      totals[1] = fmaf(factor, sums[1], totals[1]);
    }
    finish(m, item, totals);
  }
}

template <Format F>
constexpr void add_matvec_kernel(ProductKernels& kernels) {
  kernels.matvec = matvec_kernel<F>;
  kernels.planes_at = planes_at<F>;
  // 16 bytes of the first plane are a piece.
  kernels.block_pieces = PackedPlanes<F>::fields[0].bytes / 16;
}

}  // namespace mla::cuda
