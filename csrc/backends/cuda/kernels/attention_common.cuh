// What kernels of attention share: spans, cells through the block table, numbers of the cache.
//
// Nothing here trusts the values it reads: a span that does not fit the operands counts as none,
// and a block that lies outside the cache is taken to be its first cells.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backends/cuda/attention.h"
#include "backends/cuda/kernels/intrinsics.cuh"

namespace mla::cuda {

inline constexpr float kMinusInf = -__builtin_huge_valf();

// Row i of the list; n_tokens == 0 where the list has ended or the row makes no sense.
struct LoadedSpan {
  Span span;
  bool ends_list;
};
// No branch stands between the loads: they are one round trip.
__device__ inline LoadedSpan load_span(const AttentionArgs& a, int i) {
  const int32_t* row = a.spans + i * a.span_stride;
  LoadedSpan s = {{row[0], row[1], row[2], row[3], row[4], row[5]}, row[2] == 0};
  const Span& x = s.span;
  const int64_t end = int64_t{x.first_cell} + x.n_cells;
  const bool valid = (x.sequence >= 0) & (x.sequence < a.n_sequences) & (x.first_token >= 0) &
                     (x.n_tokens > 0) & (x.n_tokens <= a.t - x.first_token) &
                     (x.n_cells >= x.n_tokens) & (x.first_cell >= 0) &
                     (end <= int64_t{a.n_blocks} * a.block_cells);
  if (!valid) s.span.n_tokens = 0;
  return s;
}

// Which span has the token, or -1. All lanes of the warp call and get the same.
__device__ inline int find_span(const AttentionArgs& a, int token) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < a.n_spans; first += 32) {
    bool has = false, ends = false;
    if (first + lane < a.n_spans) {
      const LoadedSpan s = load_span(a, first + lane);
      ends = s.ends_list;
      has = token >= s.span.first_token && token - s.span.first_token < s.span.n_tokens;
    }
    const unsigned ended = __ballot_sync(0xffffffffu, ends);
    unsigned found = __ballot_sync(0xffffffffu, has);
    if (ended != 0) found &= (ended & -ended) - 1;  // rows before the end
    if (found != 0) return first + __ffs(static_cast<int>(found)) - 1;
    if (ended != 0) return -1;
  }
  return -1;
}

// Cells that a token of the span sees, counted from first_cell.
__device__ inline int visible_cells(const Span& s, int token_of_span) {
  return s.n_cells - s.n_tokens + 1 + token_of_span;
}

// The row of the cache that holds cell i of the span, 0 <= i < n_cells.
__device__ inline int64_t cache_row(const AttentionArgs& a, const Span& s, int i) {
  const int at = s.first_cell + i;
  // Sessions use blocks of 64 cells: a shift there, a division elsewhere.
  const int block = a.block_cells == 64 ? at >> 6 : at / a.block_cells;
  const int64_t first = a.table[s.sequence * a.table_stride + block];
  const int64_t row = first * a.block_cells + (at - block * a.block_cells);
  return row >= 0 && row < a.n_cells ? row : 0;
}

__device__ inline const std::byte* cell_at(const CachePlane& plane, int64_t row) {
  return plane.data + row * plane.cell_bytes;
}

// ---- numbers of a row, in float32 ---------------------------------------------------------------
// Q8_0 as in quant/blocks.h: 34 bytes, a half and 32 integers.
inline constexpr int kQ8Bytes = 34;

__device__ inline float half_bits_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

__device__ inline float cache_value(const std::byte* row, Format format, int i) {
  switch (format) {
    case Format::F32:
      return reinterpret_cast<const float*>(row)[i];
    case Format::F16:
      return __half2float(reinterpret_cast<const __half*>(row)[i]);
    case Format::BF16:
      return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row)[i]);
    default: {  // Q8_0; blocks lie at even addresses
      const std::byte* block = row + i / 32 * kQ8Bytes;
      const float d = half_bits_to_float(*reinterpret_cast<const uint16_t*>(block));
      return d * static_cast<float>(static_cast<int8_t>(block[2 + i % 32]));
    }
  }
}

// A float operand, any strides: element (token, head, i) of [T, H, dim].
__device__ inline float query_value(const View& q, int token, int head, int i) {
  return *reinterpret_cast<const float*>(q.data + token * q.stride[1] + head * q.stride[2] +
                                         i * q.stride[3]);
}

}  // namespace mla::cuda
