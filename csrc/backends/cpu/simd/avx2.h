// AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace mla::cpu::MLA_ISA {
namespace {
inline constexpr int kLanes = 8;
}  // namespace
}  // namespace mla::cpu::MLA_ISA
#include "backends/cpu/simd/lanes.h"

namespace mla::cpu::MLA_ISA {
namespace {

inline float f16_to_f32(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
inline F32 load_f16(const uint16_t* p) {
  return (F32)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_f16(uint16_t* p, F32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_bf16(uint16_t* p, F32 v) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(v[i]);
}

// ---- small integers: see simd.h -----------------------------------------------------------------
inline constexpr bool kSignedByOffset = false;
inline constexpr bool kHasBf16Dot = false;

// vpmaddubsw saturates sums of two products at 2^15, which these stay below: 2 * 127 * 127, and
// with the sign moved from w to x and |w| <= 128 as an unsigned byte, 2 * 128 * 127.
template <bool is_signed>
inline I32 dot(Bytes w, Bytes x) {
  __m256i a = (__m256i)w;
  __m256i b = (__m256i)x;
  if constexpr (is_signed) {
    b = _mm256_sign_epi8(b, a);
    a = _mm256_abs_epi8(a);
  }
  return (I32)_mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
}

inline I32 dot_add(I32 sum, Bytes w, Bytes x) { return sum + dot<false>(w, x); }

// Unsigned bytes are at most 63 here, so that sums of four products fit.
template <bool is_signed>
inline I32 dot_pair(Bytes w0, Bytes x0, Bytes w1, Bytes x1) {
  if constexpr (is_signed) return dot<true>(w0, x0) + dot<true>(w1, x1);
  const __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)w0, (__m256i)x0),
                                       _mm256_maddubs_epi16((__m256i)w1, (__m256i)x1));
  return (I32)_mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}

struct Paired {
  static constexpr int group(int i, int u) { return i / 2 * 2 + u; }
  static constexpr int half(int i, int) { return i % 2; }
};
struct Whole {
  static constexpr int group(int i, int) { return i; }
  static constexpr int half(int, int u) { return u; }
};

template <class At>
MLA_INLINE Bytes units(const uint8_t* p, const At& at) {
  const int a = at(0), b = at(1);
  if (b - a == 16) return load_as<Bytes>(p + a);
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + a));
  if (a == b) return (Bytes)_mm256_broadcastsi128_si256(low);
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + b));
  return (Bytes)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
inline Bytes add_where(Bytes q, Bytes bits, Bytes bit, uint8_t value) {
  const __m256i set = _mm256_cmpeq_epi8((__m256i)(bits & bit), (__m256i)bit);
  return q | ((Bytes)set & value);
}
template <int at>
inline Bytes add_flagged(Bytes q, Bytes header, uint8_t value) {
  const __m128i byte_of = _mm_set_epi64x(0x0101010101010101 * (at + 1), 0x0101010101010101 * at);
  const __m256i flags = _mm256_shuffle_epi8((__m256i)header, _mm256_broadcastsi128_si256(byte_of));
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  return add_where(q, (Bytes)flags, (Bytes)bit, value);
}

inline F32 spread_two(Eighth x, int first) {
  const __m256i half = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
  const __m256i index = _mm256_add_epi32(half, _mm256_set1_epi32(first));
  return (F32)_mm256_permutevar8x32_ps((__m256)x, index);
}
inline F32 spread(const F32x8& x, int part) { return spread_two(x.v[0], part / 2 * 2); }
inline F32 spread(const F32x16& x, int part) { return spread_two(x.v[part / 4], 2 * (part % 4)); }
inline F32 widened(const F32x8& x) { return x.v[0]; }
inline F32 widen_8(__m128i x, bool is_signed) {
  return (F32)_mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
}
inline F32x16 widen_u8(U8x16 x) {
  return {{widen_8((__m128i)x, false), widen_8(_mm_srli_si128((__m128i)x, 8), false)}};
}
inline F32x16 widen_s8(U8x16 x) {
  return {{widen_8((__m128i)x, true), widen_8(_mm_srli_si128((__m128i)x, 8), true)}};
}
inline F32x8 widen8_u8(U8x16 x) { return {{widen_8((__m128i)x, false)}}; }
inline F32x8 widen8_s8(U8x16 x) { return {{widen_8((__m128i)x, true)}}; }
inline F32x8 widen8_f16(U8x16 x) { return {{(F32)_mm256_cvtph_ps((__m128i)x)}}; }

// ---- rows turned round: see simd.h --------------------------------------------------------------
inline F32 f16_low(U32 x) {
  typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));
  return (F32)_mm256_cvtph_ps((__m128i) __builtin_convertvector(x, U16));
}
inline Words words_of_rows(const std::byte* p, int64_t stride) {
  __m256i row[4];  // rows i and i + 4
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto* low = reinterpret_cast<const __m128i*>(p + i * stride);
    const auto* high = reinterpret_cast<const __m128i*>(p + (i + 4) * stride);
    row[i] = _mm256_set_m128i(_mm_loadu_si128(high), _mm_loadu_si128(low));
  }
  const __m256i low01 = _mm256_unpacklo_epi32(row[0], row[1]);
  const __m256i high01 = _mm256_unpackhi_epi32(row[0], row[1]);
  const __m256i low23 = _mm256_unpacklo_epi32(row[2], row[3]);
  const __m256i high23 = _mm256_unpackhi_epi32(row[2], row[3]);
  return {{(U32)_mm256_unpacklo_epi64(low01, low23), (U32)_mm256_unpackhi_epi64(low01, low23),
           (U32)_mm256_unpacklo_epi64(high01, high23), (U32)_mm256_unpackhi_epi64(high01, high23)}};
}
inline Bytes lookup_bytes(const int8_t* table, Bytes index) {
  const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return (Bytes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(row), (__m256i)index);
}

inline constexpr bool kSumsPairs = true;
typedef int16_t FourSums __attribute__((vector_size(kLanes * 4)));
inline FourSums begin_fours(I32) { return FourSums{}; }
template <bool is_signed>
inline FourSums add_fours(FourSums sum, Bytes w, Bytes x) {
  __m256i a = (__m256i)w;
  __m256i b = (__m256i)x;
  if constexpr (is_signed) {
    b = _mm256_sign_epi8(b, a);
    a = _mm256_abs_epi8(a);
  }
  return sum + (FourSums)_mm256_maddubs_epi16(a, b);
}
inline I32 end_fours(I32 sum, FourSums four) {
  return sum + (I32)_mm256_madd_epi16((__m256i)four, _mm256_set1_epi16(1));
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
