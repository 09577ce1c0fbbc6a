// Rows of x as the fragments of small_batch.cuh want them.
//
// A row becomes 16-bit numbers, x / scale in f16 with a power of two that puts the row's largest
// magnitude in [2^9, 2^10), or x itself in bf16; k is padded with zeros to a multiple of 256. The
// four lanes t of a matrix fragment read 16 bytes each of a group of 32 numbers, for two products
// of 16: position 8 t + 4 j + s of a group holds element
//
//   packed weights   16 j + 4 t + {0, 2, 1, 3}[s]   (bytes 0 and 2, then 1 and 3, of a word)
//   plain weights    8 t + 4 j + s
//
// Behind each 256 lie, for formats with minima, the sums of the *rounded* numbers over each group
// of 32 (or 16), in two halves whose sum they are to 22 bits: 32 * 2^10 is the largest sum, within
// f16. Where weights keep the upper nibbles of a byte 16 times too large, the second half of each
// 32 is divided by 16 (packed_halves). Rounding: 2^-12 of a number; below 2^-20 of the row's
// largest, 2^-31 of that.
#pragma once

#include "backends/cuda/kernels/product_rows.cuh"
#include "backends/cuda/small_batch.h"

namespace mla::cuda {

inline constexpr int kMaxExponent = 9;  // of a staged f16 number

namespace staged {

// Elements [k, k + 4) of a row, zeros from n on.
__device__ __forceinline__ Four load(const std::byte* row, int64_t step, Format format, bool fours,
                                     int k, int n) {
  if (fours && k + 4 <= n) return load_four(row + k * step, format);
  Four out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.at[i] = k + i < n ? load_element(row + (k + i) * step, format) : 0.0f;
  }
  return out;
}

__device__ __forceinline__ float magnitude(const Four& x) {
  return fmaxf(fmaxf(fabsf(x.at[0]), fabsf(x.at[1])), fmaxf(fabsf(x.at[2]), fabsf(x.at[3])));
}

// A lane's share of 256 elements: four neighbours twice.
struct Eight {
  Four low, high;
};

template <RowLayout L>
__device__ __forceinline__ Eight load_unit(const std::byte* row, int64_t step, Format format,
                                           bool fours, int unit, int n) {
  constexpr bool packed = L != RowLayout::plain_f16 && L != RowLayout::plain_bf16;
  const int t = lane_id() % 4;
  const int k = unit * kStagedUnit + lane_id() / 4 * 32 + (packed ? 4 * t : 8 * t);
  return {load(row, step, format, fours, k, n),
          load(row, step, format, fours, k + (packed ? 16 : 4), n)};
}

// What a row with this largest magnitude is divided by: a power of two within float's normal range.
__device__ __forceinline__ float row_scale(float magnitude) {
  const int exponent = (__float_as_int(magnitude) >> 23) - 127;
  if (exponent == 128 || magnitude == 0.0f) return 1.0f;  // infinite: it stays so
  return __int_as_float((max(exponent, -100) - kMaxExponent + 127) << 23);
}

__device__ __forceinline__ uint32_t pack_halves(float a, float b, float& sum) {
  const __half2 v = __floats2half2_rn(a, b);
  const float2 back = __half22float2(v);
  sum += back.x + back.y;
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t pack_bf16(float a, float b) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&v);
}

__device__ __forceinline__ void store_sum(__half* at, float sum) {
  const __half high = __float2half_rn(sum);
  at[0] = high;
  at[2] = __float2half_rn(sum - __half2float(high));
}

// The sums of the lane's group; s0, s1: this lane's part of those of its halves. For each lane t of
// a fragment: [high of groups 2t, 2t + 1][low of these], or that for 4t, 4t + 1 and 4t + 2, 4t + 3.
template <RowLayout L>
__device__ __forceinline__ void store_sums(std::byte* unit_sums, float s0, float s1) {
  for (int step = 1; step < 4; step *= 2) {
    s0 += __shfl_xor_sync(kAllLanes, s0, step);
    s1 += __shfl_xor_sync(kAllLanes, s1, step);
  }
  const int group = lane_id() / 4;
  if (lane_id() % 4 != 0) return;
  __half* out = reinterpret_cast<__half*>(unit_sums);
  if constexpr (L != RowLayout::packed_sums16) {
    store_sum(out + group / 2 * 4 + group % 2, s0 + s1);
  } else {
    store_sum(out + group * 4, s0);
    store_sum(out + group * 4 + 1, s1);
  }
}

// Converts a unit; the warp's 32 lanes take part.
template <RowLayout L>
__device__ __forceinline__ void convert_unit(Eight x, float inverse_scale, std::byte* out) {
  constexpr bool packed = L != RowLayout::plain_f16 && L != RowLayout::plain_bf16;
  uint4 v;
  float s0 = 0.0f, s1 = 0.0f;
  if constexpr (L == RowLayout::plain_bf16) {
    v = {pack_bf16(x.low.at[0], x.low.at[1]), pack_bf16(x.low.at[2], x.low.at[3]),
         pack_bf16(x.high.at[0], x.high.at[1]), pack_bf16(x.high.at[2], x.high.at[3])};
  } else {
    constexpr float of_high = L == RowLayout::packed_halves ? 0.0625f : 1.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x.low.at[i] *= inverse_scale;
      x.high.at[i] *= inverse_scale * of_high;
    }
    constexpr int second = packed ? 2 : 1, third = packed ? 1 : 2;
    v.x = pack_halves(x.low.at[0], x.low.at[second], s0);
    v.y = pack_halves(x.low.at[third], x.low.at[3], s0);
    v.z = pack_halves(x.high.at[0], x.high.at[second], s1);
    v.w = pack_halves(x.high.at[third], x.high.at[3], s1);
    s1 /= of_high;
  }
  *reinterpret_cast<uint4*>(out + 16 * lane_id()) = v;
  if constexpr (sums_bytes(L) > 0) store_sums<L>(out + 2 * kStagedUnit, s0, s1);
}

// The row of the grid that is staged as row i.
__device__ __forceinline__ int row_to_stage(const Product& p, int i) {
  if (p.routed) return p.slots_share_x() ? i * p.extent[2] : i;
  const int per_matrix = static_cast<int>(p.rows_per_matrix());
  return row_of_matrix(p, i / per_matrix, i % per_matrix);
}

}  // namespace staged

// One row of x per block. Rows of a routed product are those of the grid, or of the tokens where
// the slots of a token share theirs; others follow each other matrix by matrix. A warp keeps its
// units in registers between the two looks at them. Also sets n_counters counters to zero.
template <RowLayout L>
__global__ void __launch_bounds__(kMaxStageThreads) stage_kernel(StageRows s) {
  __shared__ float room[kWarpThreads];
  pdl_release();  // the product's kernel has weights to fetch
  pdl_wait();
  const Product& p = s.product;
  const int index = static_cast<int>(blockIdx.x), n_units = staged_units(p.k);
  const int n_warps = static_cast<int>(blockDim.x) / kWarpThreads;
  const std::byte* row = x_row(p, staged::row_to_stage(p, index));
  if (index == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < s.n_counters; i += static_cast<int>(blockDim.x))
      s.counters[i] = 0;
  }
  staged::Eight kept[kStagedUnitsPerWarp];
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < kStagedUnitsPerWarp; ++i) {
    const int unit = warp_id() + i * n_warps;
    if (unit >= n_units) break;
    kept[i] = staged::load_unit<L>(row, p.x_step, p.x_format, s.fours, unit, p.k);
    most = fmaxf(most, fmaxf(staged::magnitude(kept[i].low), staged::magnitude(kept[i].high)));
  }
  float scale = 1.0f;
  if constexpr (L != RowLayout::plain_bf16) scale = staged::row_scale(block_max(most, room));
  if (threadIdx.x == 0) s.scales[index] = scale;
  std::byte* out = s.out + static_cast<int64_t>(index) * s.pitch;
#pragma unroll
  for (int i = 0; i < kStagedUnitsPerWarp; ++i) {
    const int unit = warp_id() + i * n_warps;
    if (unit >= n_units) break;
    staged::convert_unit<L>(kept[i], 1.0f / scale, out + unit * staged_unit_bytes(L));
  }
}

}  // namespace mla::cuda
