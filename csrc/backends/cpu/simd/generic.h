// Any machine with 128-bit vectors: SSE2 on x86-64, NEON on aarch64, through GCC vectors.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace mla::cpu::MLA_ISA {
namespace {
inline constexpr int kLanes = 4;
}  // namespace
}  // namespace mla::cpu::MLA_ISA
#include "backends/cpu/simd/lanes.h"

namespace mla::cpu::MLA_ISA {
namespace {

inline float f16_to_f32(uint16_t h) { return half_to_float(h); }
inline F32 load_f16(const uint16_t* p) {
  F32 v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
  return v;
}
inline void store_f16(uint16_t* p, F32 v) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
}
inline void store_bf16(uint16_t* p, F32 v) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(v[i]);
}

// ---- small integers: see simd.h -----------------------------------------------------------------
inline constexpr bool kSignedByOffset = false;
inline constexpr bool kHasBf16Dot = false;

// All 16 bytes of a register belong to one group, so any lane may take any of the products. Bytes
// up to 127 are the same signed and unsigned.
template <bool is_signed>
inline I32 dot(Bytes w, Bytes x) {
#if defined(__aarch64__)
  const int8x16_t a = (int8x16_t)w;
  const int8x16_t b = (int8x16_t)x;
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
  return (I32)vpadalq_s16(vpaddlq_s16(low), vmull_high_s8(a, b));
#elif defined(__SSE2__)
  const __m128i a = (__m128i)w;
  const __m128i b = (__m128i)x;
  const __m128i low = _mm_madd_epi16(_mm_srai_epi16(_mm_unpacklo_epi8(a, a), 8),
                                     _mm_srai_epi16(_mm_unpacklo_epi8(b, b), 8));
  const __m128i high = _mm_madd_epi16(_mm_srai_epi16(_mm_unpackhi_epi8(a, a), 8),
                                      _mm_srai_epi16(_mm_unpackhi_epi8(b, b), 8));
  return (I32)_mm_add_epi32(low, high);
#else
  I32 sum = {};
  for (int i = 0; i < 16; ++i) {
    sum[i & 3] += static_cast<int8_t>(w[i]) * static_cast<int8_t>(x[i]);
  }
  return sum;
#endif
}

inline void put_pair(Bytes* q, int pair, U8x32 a, U8x32 b) {
  q[4 * pair] = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  q[4 * pair + 1] =
      __builtin_shufflevector(a, a, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
  q[4 * pair + 2] =
      __builtin_shufflevector(b, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  q[4 * pair + 3] =
      __builtin_shufflevector(b, b, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}
inline F32 spread(const F32x16& x, int part) { return set1(x.v[part >> 2][part & 3]); }
inline F32x16 widen_u8(U8x16 x) {
  F32x16 out;
  for (int i = 0; i < 16; ++i) out.v[i >> 2][i & 3] = static_cast<float>(x[i]);
  return out;
}
inline F32x16 widen_s8(U8x16 x) {
  F32x16 out;
  for (int i = 0; i < 16; ++i) {
    out.v[i >> 2][i & 3] = static_cast<float>(static_cast<int8_t>(x[i]));
  }
  return out;
}
inline F32x16 widen_f16(U16x16 x) {
  F32x16 out;
  for (int i = 0; i < 16; ++i) out.v[i >> 2][i & 3] = half_to_float(x[i]);
  return out;
}

inline U8x32 lookup16(const int8_t* table, U8x32 index) {
  U8x32 out;
  for (int i = 0; i < 32; ++i) out[i] = static_cast<uint8_t>(table[index[i]]);
  return out;
}
inline U8x32 bits_to_bytes(uint32_t bits, uint8_t value) {
  U8x32 out;
  for (int i = 0; i < 32; ++i) out[i] = (bits >> i) & 1 ? value : 0;
  return out;
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
