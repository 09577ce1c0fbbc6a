// Single floats and aligned groups of four, in any float format; float32 in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "backends/cuda/kernels/intrinsics.cuh"
#include "quant/format.h"

namespace mla::cuda {

// Bits of F16 or BF16 as float32, and back, round to nearest even.
__device__ inline float widen(uint32_t bits, Format format) {
  if (format == Format::BF16) return __uint_as_float(bits << 16);
  if ((bits & 0x7fffu) > 0x7c00u) {  // the conversion would drop a NaN's sign
    return __uint_as_float((bits & 0x8000u) << 16 | 0x7f800000u | (bits & 0x3ffu) << 13);
  }
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
__device__ inline uint32_t narrow(float value, Format format) {
  if (format == Format::BF16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return __half_as_ushort(__float2half_rn(value));
}

__device__ inline float load_element(const std::byte* p, Format format) {
  if (format == Format::F32) return *reinterpret_cast<const float*>(p);
  return widen(*reinterpret_cast<const uint16_t*>(p), format);
}

__device__ inline void store_element(std::byte* p, Format format, float value) {
  if (format == Format::F32) {
    *reinterpret_cast<float*>(p) = value;
  } else {
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(narrow(value, format));
  }
}

// Four neighbours; p is a multiple of their size.
struct Four {
  float at[4];
};

__device__ inline Four load_four(const std::byte* p, Format format) {
  if (format == Format::F32) {
    const float4 x = *reinterpret_cast<const float4*>(p);
    return {{x.x, x.y, x.z, x.w}};
  }
  const uint2 x = *reinterpret_cast<const uint2*>(p);
  return {{widen(x.x & 0xffffu, format), widen(x.x >> 16, format), widen(x.y & 0xffffu, format),
           widen(x.y >> 16, format)}};
}

__device__ inline void store_four(std::byte* p, Format format, const Four& x) {
  if (format == Format::F32) {
    *reinterpret_cast<float4*>(p) = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
    return;
  }
  *reinterpret_cast<uint2*>(p) =
      make_uint2(narrow(x.at[0], format) | narrow(x.at[1], format) << 16,
                 narrow(x.at[2], format) | narrow(x.at[3], format) << 16);
}

// On the host: whether runs of four along the innermost stride may be read so, from `data` on, with
// all other strides given.
inline bool fours_are_aligned(const std::byte* data, Format format, const int64_t (&stride)[4]) {
  const int64_t bytes = traits(format).block_bytes;
  bool aligned = reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(4 * bytes) == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && stride[i] % (4 * bytes) == 0;
  return aligned && stride[3] == bytes;
}

}  // namespace mla::cuda
