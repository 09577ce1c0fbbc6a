// Rows of k_b and v_b, 32 numbers at a time, in float32.
#pragma once

#include <type_traits>
#include <utility>

#include "backends/cuda/cuda_op.h"
#include "backends/cuda/kernels/decode.cuh"

namespace mla::cuda {

inline constexpr int kGroup = 32;  // numbers that one thread decodes at a time

// Elements of a block; 1 for plain numbers.
template <Format F>
inline constexpr int kBlockElems = 1;
#define MLA_FORMAT(name, gguf, elems, bytes) \
  template <>                                \
  inline constexpr int kBlockElems<Format::name> = elems;
#include "quant/formats.def"

template <Format F>
__device__ inline float plain_value(const std::byte* row, int i) {
  static_assert(kBlockElems<F> == 1);
  if constexpr (F == Format::F32) return reinterpret_cast<const float*>(row)[i];
  if constexpr (F == Format::F16) return __half2float(reinterpret_cast<const __half*>(row)[i]);
  return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row)[i]);
}

// A whole group of plain numbers, from an address that is a multiple of 16, in 16-byte pieces.
template <Format F>
__device__ inline void load_plain_group(const std::byte* from, float (&out)[kGroup]) {
  using Element = std::conditional_t<F == Format::F32, float,
                                     std::conditional_t<F == Format::F16, __half, __nv_bfloat16>>;
  constexpr int kEach = 16 / sizeof(Element);
  uint4 pieces[kGroup / kEach];
#pragma unroll
  for (int i = 0; i < kGroup / kEach; ++i) {
    pieces[i] = load_streaming(reinterpret_cast<const uint4*>(from) + i);
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    out[i] = plain_value<F>(reinterpret_cast<const std::byte*>(pieces), i);
  }
}

// Elements [32 * group, 32 * group + 32) of a row of k, zeros from k on. Quantized rows are whole
// groups; plain ones may end within one and may begin at any element.
template <Format F>
__device__ inline void weight_group(const std::byte* row, int k, int group, float (&out)[kGroup]) {
  const int first = kGroup * group;
  if constexpr (kBlockElems < F >> 1) {
    if (first < k) {
      decode_group<F>(row, k / kBlockElems<F>, group, out);
      return;
    }
  } else if (first + kGroup <= k && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
    load_plain_group<F>(row + first * sizeof(float) / (F == Format::F32 ? 1 : 2), out);
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    out[i] = 0.0f;
    if constexpr (kBlockElems<F> == 1) {
      if (first + i < k) out[i] = plain_value<F>(row, first + i);
    }
  }
}

// Calls f with std::integral_constant<Format, F> of a weight's format.
template <class Function>
void with_weight_format(Format format, const Function& f) {
  switch (format) {
#define MLA_CASE(name)                                 \
  case Format::name:                                   \
    f(std::integral_constant<Format, Format::name>()); \
    break;
#define MLA_FLOAT(name, gguf, elems, bytes) MLA_CASE(name)
#define MLA_FORMAT(name, gguf, elems, bytes) MLA_CASE(name)
#include "quant/formats.def"
#undef MLA_CASE
    default:
      break;
  }
}

}  // namespace mla::cuda
