// The 16-bit type that tensor cores multiply: __half, or __nv_bfloat16 for caches of that type.
#pragma once

#include <type_traits>

#include "backends/cuda/kernels/intrinsics.cuh"

namespace mla::cuda {

// Rounded; what a half cannot hold becomes its largest magnitude, NaN stays.
template <class T>
__device__ inline T to_operand(float x);
template <>
__device__ inline __half to_operand<__half>(float x) {
  constexpr float kMax = 65504.0f;
  return __float2half_rn(x > kMax ? kMax : x < -kMax ? -kMax : x);
}
template <>
__device__ inline __nv_bfloat16 to_operand<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two of them, lo first; magnitudes that the type can hold.
template <class T>
__device__ inline uint32_t pack_operands(float lo, float hi) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 both = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

__device__ inline float from_operand(__half x) { return __half2float(x); }
__device__ inline float from_operand(__nv_bfloat16 x) { return __bfloat162float(x); }

// d += a b, see intrinsics.cuh.
template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    mma_f16(d, a, b);
  } else {
    mma_bf16(d, a, b);
  }
}

}  // namespace mla::cuda
