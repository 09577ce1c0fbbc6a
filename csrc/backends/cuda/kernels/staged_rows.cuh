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
// Behind them lie, for formats with minima, the sums of the *rounded* numbers over each group of 32
// (or 16), in two halves whose sum they are to 22 bits: 32 * 2^10 is the largest sum, within f16.
// Rounding: 2^-12 of a number; below 2^-24 of the row's largest, 2^-35 of that.
#pragma once

#include "backends/cuda/kernels/product_rows.cuh"
#include "backends/cuda/row_layout.h"

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

// The largest magnitude of 256 elements, in each lane its own share.
__device__ __forceinline__ float unit_magnitude(const std::byte* row, int64_t step, Format format,
                                                bool fours, int unit, int n) {
  const int k = unit * kStagedUnit + 8 * lane_id();
  return fmaxf(magnitude(load(row, step, format, fours, k, n)),
               magnitude(load(row, step, format, fours, k + 4, n)));
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
  if constexpr (L == RowLayout::packed_sums32) {
    store_sum(out + group / 2 * 4 + group % 2, s0 + s1);
  } else {
    store_sum(out + group * 4, s0);
    store_sum(out + group * 4 + 1, s1);
  }
}

// Converts unit `unit` of a row; the warp's 32 lanes take part.
template <RowLayout L>
__device__ __forceinline__ void convert_unit(const std::byte* row, int64_t step, Format format,
                                             bool fours, int unit, int n, float inverse_scale,
                                             std::byte* out) {
  constexpr bool packed = L != RowLayout::plain_f16 && L != RowLayout::plain_bf16;
  const int t = lane_id() % 4;
  const int k = unit * kStagedUnit + lane_id() / 4 * 32 + (packed ? 4 * t : 8 * t);
  Four low = load(row, step, format, fours, k, n);
  Four high = load(row, step, format, fours, k + (packed ? 16 : 4), n);
  uint4 v;
  float s0 = 0.0f, s1 = 0.0f;
  if constexpr (L == RowLayout::plain_bf16) {
    v = {pack_bf16(low.at[0], low.at[1]), pack_bf16(low.at[2], low.at[3]),
         pack_bf16(high.at[0], high.at[1]), pack_bf16(high.at[2], high.at[3])};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low.at[i] *= inverse_scale;
      high.at[i] *= inverse_scale;
    }
    constexpr int second = packed ? 2 : 1, third = packed ? 1 : 2;
    v.x = pack_halves(low.at[0], low.at[second], s0);
    v.y = pack_halves(low.at[third], low.at[3], s0);
    v.z = pack_halves(high.at[0], high.at[second], s1);
    v.w = pack_halves(high.at[third], high.at[3], s1);
  }
  *reinterpret_cast<uint4*>(out + unit * 2 * kStagedUnit + 16 * lane_id()) = v;
  if constexpr (sums_bytes(L) > 0) {
    store_sums<L>(out + staged_units(n) * 2 * kStagedUnit + unit * sums_bytes(L), s0, s1);
  }
}

// Stages rows x_of(0 .. n_rows - 1), with all warps of the block: out[row * pitch] and scales[row].
// largest [n_rows] is shared memory, zeros when this begins.
template <RowLayout L, class RowOf>
__device__ __forceinline__ void stage_rows(const Product& p, bool fours, int n_rows,
                                           const RowOf& x_of, int pitch, std::byte* out,
                                           float* scales, int* largest) {
  const int n_units = staged_units(p.k), n_warps = static_cast<int>(blockDim.x) / kWarpThreads;
  if constexpr (L != RowLayout::plain_bf16) {
    for (int row = 0; row < n_rows; ++row) {
      const std::byte* from = x_of(row);
      float most = 0.0f;
#pragma unroll 4
      for (int unit = warp_id(); unit < n_units; unit += n_warps) {
        most = fmaxf(most, unit_magnitude(from, p.x_step, p.x_format, fours, unit, p.k));
      }
      most = warp_max(most);  // magnitudes order as their bits do
      if (lane_id() == 0) atomicMax(&largest[row], __float_as_int(most));
    }
    __syncthreads();
  }
  for (int i = warp_id(); i < n_rows * n_units; i += n_warps) {
    const int row = i / n_units, unit = i % n_units;
    const float scale = L == RowLayout::plain_bf16 ? 1.0f : row_scale(__int_as_float(largest[row]));
    convert_unit<L>(x_of(row), p.x_step, p.x_format, fours, unit, p.k, 1.0f / scale,
                    out + static_cast<int64_t>(row) * pitch);
    if (unit == 0 && lane_id() == 0) scales[row] = scale;
  }
}

}  // namespace staged

// One row of x per block, to global memory: for products whose rows do not fit a block's memory.
// Row i is row i of the grid, or of the tokens where the slots of a token share theirs.
template <RowLayout L>
__global__ void __launch_bounds__(256)
    stage_kernel(Product p, bool fours, std::byte* out, float* scales, int pitch) {
  __shared__ int largest;
  pdl_trigger();
  if (threadIdx.x == 0) largest = 0;
  pdl_wait();
  __syncthreads();
  const int row = static_cast<int>(blockIdx.x) * (p.slots_share_x() ? p.extent[2] : 1);
  staged::stage_rows<L>(
      p, fours, 1, [&](int) { return x_row(p, row); }, pitch,
      out + static_cast<int64_t>(blockIdx.x) * pitch, scales + blockIdx.x, &largest);
}

}  // namespace mla::cuda
