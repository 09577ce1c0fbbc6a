// Tensors to rows of 16-bit numbers, see dequantize.h.
//
// Packed rows: a thread decodes a group of 32 elements, that is 64 bytes; four neighbouring threads
// then exchange quarters, so that each stores 16 bytes of each of their four groups and the four
// together 64 bytes in a row. Error: one rounding to half.
#pragma once

#include <cstdint>
#include <type_traits>

#include "backends/cuda/cuda_op.h"
#include "backends/cuda/kernels/decode.cuh"
#include "backends/cuda/kernels/elements.cuh"

namespace mla::cuda {

inline constexpr int kDequantizeThreads = 256;

template <class Element>
__device__ inline uint16_t element_bits(float value) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __half_as_ushort(__float2half_rn(value));
  } else {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
}

// Row `row` of all rows of the tensor, outermost dim first.
__device__ inline const std::byte* row_of(const View& x, int64_t row) {
  const int64_t matrix = row / x.extent[2];
  return x.data + row % x.extent[2] * x.stride[2] + matrix % x.extent[1] * x.stride[1] +
         matrix / x.extent[1] * x.stride[0];
}

// The first two dims follow from the third, so that rows need no division.
inline bool rows_are_uniform(const View& x) {
  return (x.extent[1] == 1 || x.stride[1] == x.extent[2] * x.stride[2]) &&
         (x.extent[0] == 1 || x.stride[0] == x.extent[1] * x.stride[1] ||
          (x.extent[1] == 1 && x.stride[0] == x.extent[2] * x.stride[2]));
}

// The 4 x 4 matrix of 16-byte pieces that four lanes hold, a row each, transposed.
__device__ inline void transpose_quad(uint4 (&piece)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = (lane_id() & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      uint4& low = piece[i];
      uint4& high = piece[i + step];
      uint4 sent = upper ? low : high;
      sent.x = __shfl_xor_sync(kAllLanes, sent.x, step);
      sent.y = __shfl_xor_sync(kAllLanes, sent.y, step);
      sent.z = __shfl_xor_sync(kAllLanes, sent.z, step);
      sent.w = __shfl_xor_sync(kAllLanes, sent.w, step);
      (upper ? low : high) = sent;
    }
  }
}

struct DequantizeArgs {
  View w;
  bool uniform;
  int64_t first_row;
  int n_rows, n_groups, n_blocks;  // of a row
  int quads;                       // of 128 elements, up to k_padded
  int k_padded;
  uint16_t* out;
};

// Grid: n_rows * quads * 4 threads.
template <Format F>
__global__ void __launch_bounds__(kDequantizeThreads) dequantize_packed(DequantizeArgs a) {
  pdl_wait();
  const unsigned index = blockIdx.x * kDequantizeThreads + threadIdx.x;
  const unsigned per_row = 4u * static_cast<unsigned>(a.quads);
  const unsigned row = index / per_row;
  const int group = static_cast<int>(index - row * per_row);
  const bool inside = row < static_cast<unsigned>(a.n_rows);
  uint4 piece[4] = {};
  if (inside && group < a.n_groups) {
    const int64_t at = a.first_row + row;
    const std::byte* data = a.uniform ? a.w.data + at * a.w.stride[2] : row_of(a.w, at);
    __half2 values[16];
    decode_group_half<F>(data, a.n_blocks, group, values);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      (&piece[i / 4].x)[i % 4] = *reinterpret_cast<const uint32_t*>(&values[i]);
    }
  }
  transpose_quad(piece);
  if (!inside) return;
  const int column = group / 4 * 128 + lane_id() % 4 * 8;
  uint16_t* out = a.out + int64_t{row} * a.k_padded + column;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + 32 * i < a.k_padded) *reinterpret_cast<uint4*>(out + 32 * i) = piece[i];
  }
}

struct ConvertArgs {
  View x;
  int64_t first_row, n_chunks;  // of 8 columns, in all rows
  int k, k_padded;
  bool aligned;  // runs of four may be loaded at once
  uint16_t* out;
};

__device__ inline Four load_four_of(const View& x, const std::byte* row, int column, int k,
                                    bool aligned) {
  const std::byte* p = row + column * x.stride[3];
  if (aligned && column + 4 <= k) return load_four(p, x.format);
  Four out = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < k) out.at[i] = load_element(p + i * x.stride[3], x.format);
  }
  return out;
}

template <class Element>
__device__ inline uint2 pack_four(const Four& x, float scale) {
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = element_bits<Element>(x.at[i] * scale);
  return make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
}

// Plain formats, any strides: a thread per 8 columns.
template <class Element>
__global__ void __launch_bounds__(kDequantizeThreads) convert_rows(ConvertArgs a) {
  pdl_wait();
  const int64_t index = int64_t{blockIdx.x} * kDequantizeThreads + threadIdx.x;
  if (index >= a.n_chunks) return;
  const int chunks = a.k_padded / 8;
  const int column = static_cast<int>(index % chunks) * 8;
  const std::byte* row = row_of(a.x, a.first_row + index / chunks);
  const uint2 low = pack_four<Element>(load_four_of(a.x, row, column, a.k, a.aligned), 1.0f);
  const uint2 high = pack_four<Element>(load_four_of(a.x, row, column + 4, a.k, a.aligned), 1.0f);
  *reinterpret_cast<uint4*>(a.out + index * 8) = make_uint4(low.x, low.y, high.x, high.y);
}

// A block per row: its largest magnitude, then its elements.
template <class Element>
__global__ void __launch_bounds__(kDequantizeThreads) prepare(ConvertArgs a, float* row_scale) {
  __shared__ float reduce[32];
  pdl_wait();
  const std::byte* row = row_of(a.x, blockIdx.x);
  const int stride = 4 * static_cast<int>(blockDim.x);
  float scale = 1.0f, inverse = 1.0f;
  if constexpr (std::is_same_v<Element, __half>) {
    float largest = 0;
    for (int k = 4 * static_cast<int>(threadIdx.x); k < a.k; k += stride) {
      const Four x = load_four_of(a.x, row, k, a.k, a.aligned);
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(x.at[i]));
    }
    largest = block_max(largest, reduce);
    // 2^s puts `largest` into [2^14, 2^15); below 2^-86, and for zeros, both factors stay normal.
    const int s = max((__float_as_int(largest) >> 23) - 127 - 14, -100);
    scale = __int_as_float((127 + s) << 23);
    inverse = __int_as_float((127 - s) << 23);
  }
  uint16_t* out = a.out + int64_t{blockIdx.x} * a.k_padded;
  for (int k = 4 * static_cast<int>(threadIdx.x); k < a.k_padded; k += stride) {
    const Four x = load_four_of(a.x, row, k, a.k, a.aligned);
    *reinterpret_cast<uint2*>(out + k) = pack_four<Element>(x, inverse);
  }
  if (threadIdx.x == 0 && row_scale != nullptr) row_scale[blockIdx.x] = scale;
}

struct TransposeArgs {
  View w;
  int n_rows, k, n_blocks;  // of a matrix; of a row
  int r_padded;
  uint16_t* out;
};

inline constexpr int kTransposeRows = 64;  // of w: 128 bytes of a result's row

// Grid: (groups of 32 columns, row tiles, matrices). A thread decodes a group of one row.
template <Format F, class Element>
__global__ void __launch_bounds__(kTransposeRows) dequantize_turned(TransposeArgs a) {
  constexpr bool kPlain = F == Format::F32 || F == Format::F16 || F == Format::BF16;
  __shared__ __align__(16) uint16_t tile[kDecodeGroup][kTransposeRows + 8];
  pdl_wait();
  const int thread = static_cast<int>(threadIdx.x);
  const int first_row = static_cast<int>(blockIdx.y) * kTransposeRows;
  const int first_column = static_cast<int>(blockIdx.x) * kDecodeGroup;
  float values[kDecodeGroup] = {};
  if (first_row + thread < a.n_rows) {
    const std::byte* row = row_of(a.w, int64_t{blockIdx.z} * a.n_rows + first_row + thread);
    if constexpr (kPlain) {
#pragma unroll
      for (int i = 0; i < kDecodeGroup; ++i) {
        if (first_column + i < a.k) {
          values[i] = load_element(row + (first_column + i) * a.w.stride[3], F);
        }
      }
    } else {
      decode_group<F>(row, a.n_blocks, blockIdx.x, values);
    }
  }
#pragma unroll
  for (int i = 0; i < kDecodeGroup; ++i) tile[i][thread] = element_bits<Element>(values[i]);
  __syncthreads();
  uint16_t* out = a.out + int64_t{blockIdx.z} * a.k * a.r_padded;
  constexpr int kPieces = kTransposeRows / 8;
  for (int i = thread; i < kDecodeGroup * kPieces; i += kTransposeRows) {
    const int column = first_column + i / kPieces, row = first_row + i % kPieces * 8;
    if (column >= a.k || row >= a.r_padded) continue;
    *reinterpret_cast<uint4*>(out + int64_t{column} * a.r_padded + row) =
        *reinterpret_cast<const uint4*>(&tile[i / kPieces][i % kPieces * 8]);
  }
}

}  // namespace mla::cuda
