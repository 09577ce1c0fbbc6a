// Products in float32: out[r][n] = sum_k x[r][k] w[n][k], weights decoded in registers.
//
// Shapes: product.h; any strides of x and of plain weights, every format. A warp owns R result rows
// (of one matrix) times C columns; its lanes stride over k, in runs of 4 numbers of plain weights
// and of 32 of packed ones, and meet in a shuffle. With few columns the 8 warps of a block divide
// k instead of the columns (split = 8): 256 columns are then 256 blocks and not 32. The order of
// summation depends on n and k alone, so that a row has the same bits whatever rows it comes with.
// Error: that of float32 sums, k / 256 + 13 roundings deep.
#pragma once

#include "backends/cuda/kernels/decode.cuh"
#include "backends/cuda/kernels/norm.cuh"
#include "backends/cuda/kernels/product_rows.cuh"
#include "backends/cuda/product_kernels.h"

namespace mla::cuda {

template <Format F>
inline constexpr bool kPlain = F == Format::F32 || F == Format::F16 || F == Format::BF16;
template <Format F>
inline constexpr int kElemsPerBlock = 1;
#define MLA_FORMAT(name, gguf, elems, bytes) \
  template <>                                \
  inline constexpr int kElemsPerBlock<Format::name> = elems;
#include "quant/formats.def"

namespace exact {

// sums[r][c] += this lane's part of x[r] . w[c], runs of four neighbours.
template <Format F, int R, int C>
__device__ __forceinline__ void dot_fours(const Product& p, const std::byte* const (&x)[R],
                                          const std::byte* const (&w)[C], int first, int stride,
                                          float (&sums)[R][C]) {
#pragma unroll 2
  for (int k = 4 * first; k < p.k; k += 4 * stride) {
    Four wv[C];
#pragma unroll
    for (int c = 0; c < C; ++c) wv[c] = load_four(w[c] + k * (F == Format::F32 ? 4 : 2), F);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const Four xv = load_four(x[r] + k * p.x_step, p.x_format);
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r][c] = fmaf(xv.at[i], wv[c].at[i], sums[r][c]);
      }
    }
  }
}

// The same for any strides.
template <Format F, int R, int C>
__device__ __forceinline__ void dot_strided(const Product& p, const Weight& weight,
                                            const std::byte* const (&x)[R],
                                            const std::byte* const (&w)[C], int first, int stride,
                                            float (&sums)[R][C]) {
  for (int k = first; k < p.k; k += stride) {
    float wv[C];
#pragma unroll
    for (int c = 0; c < C; ++c) wv[c] = load_element(w[c] + k * weight.step, F);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float xv = load_element(x[r] + k * p.x_step, p.x_format);
#pragma unroll
      for (int c = 0; c < C; ++c) sums[r][c] = fmaf(xv, wv[c], sums[r][c]);
    }
  }
}

// The same for packed rows, a group at a time.
template <Format F, int R, int C>
__device__ __forceinline__ void dot_groups(const Product& p, bool fours,
                                           const std::byte* const (&x)[R],
                                           const std::byte* const (&w)[C], int first, int stride,
                                           float (&sums)[R][C]) {
  static_assert(C == 1);
  const int n_blocks = p.k / kElemsPerBlock<F>;
  for (int group = first; group < p.k / kDecodeGroup; group += stride) {
    float wv[kDecodeGroup];
    decode_group<F>(w[0], n_blocks, group, wv);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const std::byte* row = x[r] + static_cast<int64_t>(group) * kDecodeGroup * p.x_step;
#pragma unroll
      for (int i = 0; i < kDecodeGroup; i += 4) {
        Four xv;
        if (fours) {
          xv = load_four(row + i * p.x_step, p.x_format);
        } else {
          for (int j = 0; j < 4; ++j) xv.at[j] = load_element(row + (i + j) * p.x_step, p.x_format);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[r][0] = fmaf(xv.at[j], wv[i + j], sums[r][0]);
      }
    }
  }
}

template <Format F, int R, int C>
__device__ __forceinline__ void dot(const Product& p, const Weight& weight, const ExactRun& run,
                                    const std::byte* const (&x)[R], const std::byte* const (&w)[C],
                                    int slice, float (&sums)[R][C]) {
  const int first = slice * kWarpThreads + lane_id(), stride = run.split * kWarpThreads;
  if constexpr (!kPlain<F>) {
    dot_groups<F>(p, run.fours, x, w, first, stride, sums);
  } else if (run.fours) {
    dot_fours<F>(p, x, w, first, stride, sums);
  } else {
    dot_strided<F>(p, weight, x, w, first, stride, sums);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < C; ++c) sums[r][c] = warp_sum(sums[r][c]);
  }
}

// Brings a warp's part of its rows of w to L2 while the kernel before still runs.
__device__ __forceinline__ void prefetch_row(const std::byte* row, int64_t bytes, int slice,
                                             int split) {
  constexpr int kLine = 128;
  for (int64_t at = static_cast<int64_t>(slice * kWarpThreads + lane_id()) * kLine; at < bytes;
       at += split * kWarpThreads * kLine) {
    prefetch_l2(row + at);
  }
}

// The only row of x, normed, in shared memory: [k] float32.
__device__ __forceinline__ const std::byte* stage_normed(const Product& p) {
  __shared__ NormRoom room;
  float* row = dynamic_smem<float>();
  float sum = 0.0f;
  for (int k = static_cast<int>(threadIdx.x); k < p.k; k += kExactThreads) {
    const std::byte* at = p.x + k * p.x_step;
    const float x = p.x_format == Format::F32 ? load_coherent(reinterpret_cast<const float*>(at))
                                              : load_element(at, p.x_format);
    row[k] = x;
    sum = fmaf(x, x, sum);
  }
  const NormFactor factor = norm_factor(sum, p.x, p.x_step, p.x_format, p.k, p.norm.eps, room);
  for (int k = static_cast<int>(threadIdx.x); k < p.k; k += kExactThreads) {
    float x = factor.times(row[k]);
    if (p.norm.weight != nullptr) {
      x *= load_element(p.norm.weight + k * p.norm.weight_stride, Format::F32);
    }
    row[k] = x;
  }
  __syncthreads();
  return reinterpret_cast<const std::byte*>(row);
}

}  // namespace exact

// Blocks: (matrix or routed row, row tile, block of columns), the last fastest.
template <Format F, int R, int C>
__global__ void __launch_bounds__(kExactThreads) exact_kernel(Product p, ExactRun run) {
  __shared__ float parts[kExactWarps][R * C];
  const Weight& weight = p.w;
  const int columns = kExactWarps / run.split * C;
  const int n_column_blocks = (p.n + columns - 1) / columns;
  const int n0 =
      static_cast<int>(blockIdx.x) % n_column_blocks * columns + warp_id() / run.split * C;
  const int tile = static_cast<int>(blockIdx.x) / n_column_blocks;
  const int matrix = tile / run.n_row_tiles, first_row = tile % run.n_row_tiles * R;
  const int slice = warp_id() % run.split;
  const int64_t n_rows = p.routed ? 1 : p.rows_per_matrix();
  if (!p.routed && weight.step >= 0 && n0 < p.n) {
    const int64_t bytes = kPlain<F> ? p.k * weight.step : weight.row_stride;
    const std::byte* row = matrix_of(p, weight, matrix) + n0 * weight.row_stride;
    if (bytes > 0) exact::prefetch_row(row, bytes, slice, run.split);
  }
  run.waits_last ? pdl_release() : pdl_wait();
  const bool normed = R == 1 && p.norm.used;
  if (normed) {
    p.x = exact::stage_normed(p);
    p.x_format = Format::F32;
    p.x_step = sizeof(float);
  }

  int rows[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int local = static_cast<int>(min(static_cast<int64_t>(first_row + r), n_rows - 1));
    rows[r] = p.routed ? matrix * (p.summed ? p.extent[2] : 1) : row_of_matrix(p, matrix, local);
  }
  float totals[R][C] = {};
  for (int slot = 0; slot < p.n_slots; ++slot) {
    const int expert = p.routed ? expert_of(p, rows[0] + slot) : 0;
    const std::byte* base = p.routed ? expert_matrix(weight, expert) : matrix_of(p, weight, matrix);
    const std::byte* x[R];
    const std::byte* w[C];
#pragma unroll
    for (int r = 0; r < R; ++r) x[r] = x_row(p, rows[r] + slot);
#pragma unroll
    for (int c = 0; c < C; ++c) w[c] = base + min(n0 + c, p.n - 1) * weight.row_stride;
    float sums[R][C] = {};
    if (n0 < p.n) exact::dot<F>(p, weight, run, x, w, slice, sums);
    const float factor = expert < 0 ? NAN : p.summed ? weight_of(p, rows[0] + slot) : 1.0f;
#pragma unroll
    for (int i = 0; i < R * C; ++i) totals[i / C][i % C] += factor * sums[i / C][i % C];
  }

#pragma unroll
  for (int i = 0; i < R * C; ++i) {
    if (lane_id() == i) parts[warp_id()][i] = totals[i / C][i % C];
  }
  __syncthreads();
  const int r = lane_id() / C, c = lane_id() % C;
  if (run.waits_last) pdl_wait();
  if (slice != 0 || r >= R || first_row + r >= n_rows || n0 + c >= p.n) return;
  float value = 0.0f;
  for (int i = 0; i < run.split; ++i) value += parts[warp_id() + i][lane_id()];
  const int row = p.routed ? rows[0] : row_of_matrix(p, matrix, first_row + r);
  finish_product(p, run.finish, row, n0 + c, value);
}

// Packed weights [K, N] contracted across their rows: a block owns one result row and 32 columns,
// its threads stride over k.
template <Format F>
__global__ void __launch_bounds__(kExactThreads) exact_across_kernel(Product p, Finish finish) {
  __shared__ float parts[kExactWarps][kDecodeGroup];
  pdl_wait();
  const int n_groups = p.n / kDecodeGroup;
  const int group = static_cast<int>(blockIdx.x) % n_groups;
  const int row = static_cast<int>(blockIdx.x) / n_groups;
  const GridIndex i = grid_index(p, row);
  const std::byte* w = p.w.data + i.i0 / p.ratio[0] * p.w.matrix_stride[0] +
                       i.i1 / p.ratio[1] * p.w.matrix_stride[1];
  const std::byte* x = x_row(p, row);
  float sums[kDecodeGroup] = {};
  for (int k = static_cast<int>(threadIdx.x); k < p.k; k += kExactThreads) {
    float values[kDecodeGroup];
    decode_group<F>(w + k * p.w.row_stride, p.n / kElemsPerBlock<F>, group, values);
    const float xv = load_element(x + k * p.x_step, p.x_format);
#pragma unroll
    for (int l = 0; l < kDecodeGroup; ++l) sums[l] = fmaf(xv, values[l], sums[l]);
  }
#pragma unroll
  for (int l = 0; l < kDecodeGroup; ++l) {
    const float sum = warp_sum(sums[l]);
    if (lane_id() == l) parts[warp_id()][l] = sum;
  }
  __syncthreads();
  if (warp_id() != 0) return;
  float value = 0.0f;
  for (int i = 0; i < kExactWarps; ++i) value += parts[i][lane_id()];
  finish_product(p, finish, row, group * kDecodeGroup + lane_id(), value);
}

template <Format F>
constexpr void add_exact_kernels(ProductKernels& kernels) {
  kernels.columns = kPlain<F> ? kExactColumns : 1;
  kernels.exact_one = exact_kernel<F, 1, 1>;
  kernels.exact_many = exact_kernel < F, kExactRows, kPlain<F> ? kExactColumns : 1 > ;
  if constexpr (!kPlain<F>) kernels.exact_across = exact_across_kernel<F>;
}

}  // namespace mla::cuda
