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

template <bool is_signed>
inline I32 dot_pair(Bytes w0, Bytes x0, Bytes w1, Bytes x1) {
  return dot_add(dot<is_signed>(w0, x0), w1, x1);
}

// Formats of 256 elements keep two neighbouring groups in the same bytes if they scale 32, those of
// the first and the second 128 side by side if they scale 16.
struct Paired {
  static constexpr int group(int i, int u) { return 2 * u + i / 2; }
  static constexpr int half(int i, int) { return i % 2; }
};
struct Whole {
  static constexpr int group(int i, int u) { return i + 4 * (u / 2); }
  static constexpr int half(int, int u) { return u % 2; }
};

template <class At>
MLA_INLINE Bytes units(const uint8_t* p, const At& at) {
  const int a = at(0), b = at(1), c = at(2), d = at(3);  // known to the compiler: one case remains
  const auto load128 = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
  };
  const auto load256 = [&](int i) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
  };
  const auto load512 = [&](int i) { return _mm512_loadu_si512(p + i); };
  const auto join = [&](__m256i low, __m256i high) {
    return (Bytes)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  };
  if (b - a == 16 && d - c == 16) {
    if (c == a) return (Bytes)_mm512_broadcast_i64x4(load256(a));
    return c - a == 32 ? (Bytes)load512(a) : join(load256(a), load256(c));
  }
  if (a == b && c == d) {
    if (c == a) return (Bytes)_mm512_broadcast_i32x4(load128(a));
    return join(_mm256_broadcastsi128_si256(load128(a)), _mm256_broadcastsi128_si256(load128(c)));
  }
  if (b - a == 32 && c - b == 32 && d - c == 32) {  // the same half of four pieces of 32
    const int first = a & ~16;
    return (Bytes)((a & 16) != 0 ? _mm512_shuffle_i32x4(load512(first), load512(first + 64), 0xdd)
                                 : _mm512_shuffle_i32x4(load512(first), load512(first + 64), 0x88));
  }
  return join(_mm256_inserti128_si256(_mm256_castsi128_si256(load128(a)), load128(b), 1),
              _mm256_inserti128_si256(_mm256_castsi128_si256(load128(c)), load128(d), 1));
}
inline Bytes add_where(Bytes q, Bytes bits, Bytes bit, uint8_t value) {
  const __mmask64 where = _mm512_test_epi8_mask((__m512i)bits, (__m512i)bit);
  return (Bytes)_mm512_mask_add_epi8((__m512i)q, where, (__m512i)q,
                                     _mm512_set1_epi8(static_cast<char>(value)));
}
template <int at>
inline Bytes add_flagged(Bytes q, Bytes header, uint8_t value) {
  const __m128i byte_of = _mm_set_epi64x(0x0101010101010101 * (at + 1), 0x0101010101010101 * at);
  const __m512i flags = _mm512_shuffle_epi8((__m512i)header, _mm512_broadcast_i32x4(byte_of));
  const __m512i bit = _mm512_set1_epi64(static_cast<long long>(0x8040201008040201));
  return add_where(q, (Bytes)flags, (Bytes)bit, value);
}

inline F32 spread(const F32x8& x, int part) {
  const __m512i even = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
  const __m512i index = _mm512_add_epi32(even, _mm512_set1_epi32(part / 2));
  return (F32)_mm512_permutexvar_ps(index, _mm512_castps256_ps512((__m256)x.v[0]));
}
inline F32 spread(const F32x16& x, int part) {
  const __m512i first = _mm512_set_epi32(9, 9, 9, 9, 8, 8, 8, 8, 1, 1, 1, 1, 0, 0, 0, 0);
  const __m512i index = _mm512_add_epi32(first, _mm512_set1_epi32(2 * part));
  return (F32)_mm512_permutexvar_ps(index, (__m512)x.v[0]);
}
inline F32 widened(const F32x8& x) { return (F32)_mm512_zextps256_ps512((__m256)x.v[0]); }
inline F32x8 widen8_u8(U8x16 x) {
  return {{(Eighth)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32((__m128i)x))}};
}
inline F32x8 widen8_s8(U8x16 x) {
  return {{(Eighth)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32((__m128i)x))}};
}
inline F32x8 widen8_f16(U8x16 x) { return {{(Eighth)_mm256_cvtph_ps((__m128i)x)}}; }
inline F32x16 widen_u8(U8x16 x) { return {{to_f32((I32)_mm512_cvtepu8_epi32((__m128i)x))}}; }
inline F32x16 widen_s8(U8x16 x) { return {{to_f32((I32)_mm512_cvtepi8_epi32((__m128i)x))}}; }

// ---- rows turned round: see simd.h --------------------------------------------------------------
inline F32 f16_low(U32 x) { return (F32)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)x)); }
inline Words words_of_rows(const std::byte* p, int64_t stride) {
  __m512i row[4];  // rows i, i + 4, i + 8, i + 12
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto quarter = [&](int q) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + (i + 4 * q) * stride));
    };
    row[i] = _mm512_castsi128_si512(quarter(0));
    row[i] = _mm512_inserti32x4(row[i], quarter(1), 1);
    row[i] = _mm512_inserti32x4(row[i], quarter(2), 2);
    row[i] = _mm512_inserti32x4(row[i], quarter(3), 3);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(row[0], row[1]);
  const __m512i high01 = _mm512_unpackhi_epi32(row[0], row[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(row[2], row[3]);
  const __m512i high23 = _mm512_unpackhi_epi32(row[2], row[3]);
  return {{(U32)_mm512_unpacklo_epi64(low01, low23), (U32)_mm512_unpackhi_epi64(low01, low23),
           (U32)_mm512_unpacklo_epi64(high01, high23), (U32)_mm512_unpackhi_epi64(high01, high23)}};
}
inline Bytes lookup_bytes(const int8_t* table, Bytes index) {
  const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return (Bytes)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(row), (__m512i)index);
}

inline constexpr bool kSumsPairs = false;
typedef I32 FourSums;
inline FourSums begin_fours(I32 sum) { return sum; }
template <bool is_signed>
inline FourSums add_fours(FourSums sum, Bytes w, Bytes x) {
  return dot_add(sum, w, x);
}
inline I32 end_fours(I32, FourSums four) { return four; }

#if defined(MLA_ISA_AVX512BF16)
inline constexpr bool kHasBf16Dot = true;
inline F32 dot_bf16(F32 acc, const uint16_t* w, const uint16_t* x) {
  return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(w),
                               (__m512bh)_mm512_loadu_si512(x));
}

// ---- pairs of bf16: see simd.h ------------------------------------------------------------------
MLA_INLINE F32 dot_pairs(F32 acc, I32 w, I32 x) {
  return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
}
MLA_INLINE I32 join_pairs(F32 low, F32 high) {
  return (I32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
MLA_INLINE I32 zip_pairs(F32 even, F32 odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (I32)_mm512_permutexvar_epi16(order, (__m512i)join_pairs(even, odd));
}
MLA_INLINE void zip_words(I32 even, I32 odd, I32* low, I32* high) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  *low = (I32)_mm512_permutex2var_epi16((__m512i)even, first, (__m512i)odd);
  *high = (I32)_mm512_permutex2var_epi16((__m512i)even, second, (__m512i)odd);
}
// x = n + r with n = floor(x), and 2^r by the polynomial of degree 4 whose largest relative error
// on [0, 1) is least among those that are 1 at 0.
MLA_INLINE F32 exp2_near(F32 x) {
  const F32 r = (F32)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F32 p = set1(0.0134267015f);
  p = p * r + set1(0.0522424467f);
  p = p * r + set1(0.241280213f);
  p = p * r + set1(0.693044841f);
  p = p * r + set1(1.0f);
  return (F32)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#else
inline constexpr bool kHasBf16Dot = false;
#endif

}  // namespace
}  // namespace mla::cpu::MLA_ISA
