// AVX-512 F, BW, VL, DQ and VNNI; with BF16 where MLA_ISA_AVX512BF16 is set.
#pragma once

// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace mla::cpu::MLA_ISA {
namespace {
inline constexpr int kLanes = 16;
}  // namespace
}  // namespace mla::cpu::MLA_ISA
#include "backends/cpu/simd/lanes.h"

namespace mla::cpu::MLA_ISA {
namespace {

inline float f16_to_f32(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
inline F32 load_f16(const uint16_t* p) {
  return (F32)_mm512_maskz_cvtph_ps(0xffff,
                                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, F32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_bf16(uint16_t* p, F32 v) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(v[i]);
}

// ---- small integers: see simd.h -----------------------------------------------------------------
// vpdpbusd multiplies unsigned by signed bytes, so signed weights are stored plus 128.
inline constexpr bool kSignedByOffset = true;

template <bool is_signed>
inline I32 dot(Bytes w, Bytes x) {
  return (I32)_mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)w, (__m512i)x);
}

inline I32 dot_add(I32 sum, Bytes w, Bytes x) {
  return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}

inline void put_pair(Bytes* q, int pair, U8x32 a, U8x32 b) {
  q[pair] = (Bytes)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1);
}
inline F32 spread(const F32x16& x, int part) {
  const __m512i quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  const __m512i index = _mm512_add_epi32(quarter, _mm512_set1_epi32(4 * part));
  return (F32)_mm512_permutexvar_ps(index, (__m512)x.v[0]);
}
inline F32x16 widen_u8(U8x16 x) { return {{to_f32((I32)_mm512_cvtepu8_epi32((__m128i)x))}}; }
inline F32x16 widen_s8(U8x16 x) { return {{to_f32((I32)_mm512_cvtepi8_epi32((__m128i)x))}}; }
inline F32x16 widen_f16(U16x16 x) { return {{(F32)_mm512_cvtph_ps((__m256i)x)}}; }

inline U8x32 concat(U8x16 low, U8x16 high) {
  return (U8x32)_mm256_set_m128i((__m128i)high, (__m128i)low);
}
inline U8x32 lookup16(const int8_t* table, U8x32 index) {
  const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return (U8x32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(row), (__m256i)index);
}
inline U8x32 bits_to_bytes(uint32_t bits, uint8_t value) {
  return (U8x32)_mm256_maskz_mov_epi8(bits, _mm256_set1_epi8(static_cast<char>(value)));
}

#if defined(MLA_ISA_AVX512BF16)
inline constexpr bool kHasBf16Dot = true;
inline F32 dot_bf16(F32 acc, const uint16_t* w, const uint16_t* x) {
  return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(w),
                               (__m512bh)_mm512_loadu_si512(x));
}
#else
inline constexpr bool kHasBf16Dot = false;
#endif

}  // namespace
}  // namespace mla::cpu::MLA_ISA
