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
// Moved to where a float has them, the bits of a half mean 2^-112 of its value, subnormals
// included; only infinities and NaNs need their exponent filled up.
inline F32 load_f16(const uint16_t* p) {
  typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));
  U16 h;
  std::memcpy(&h, p, sizeof h);
  const I32 wide = __builtin_convertvector(h, I32);
  const I32 magnitude = (wide & 0x7fff) << 13;
  const I32 special = (magnitude >= (0x7c00 << 13)) & 0x7f800000;
  const I32 bits = std::bit_cast<I32>(std::bit_cast<F32>(magnitude) * set1(0x1p112f));
  return std::bit_cast<F32>(bits | special | ((wide & 0x8000) << 16));
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

inline I32 dot_add(I32 sum, Bytes w, Bytes x) { return sum + dot<false>(w, x); }

template <bool is_signed>
inline I32 dot_pair(Bytes w0, Bytes x0, Bytes w1, Bytes x1) {
  return dot<is_signed>(w0, x0) + dot<is_signed>(w1, x1);
}

struct Paired {
  static constexpr int group(int i, int) { return i / 2; }
  static constexpr int half(int i, int) { return i % 2; }
};
using Whole = Paired;

template <class At>
MLA_INLINE Bytes units(const uint8_t* p, const At& at) {
  return load_as<Bytes>(p + at(0));
}
inline Bytes add_where(Bytes q, Bytes bits, Bytes bit, uint8_t value) {
  return q | ((Bytes)((bits & bit) == bit) & value);
}
template <int at>
inline Bytes add_flagged(Bytes q, Bytes header, uint8_t value) {
  typedef uint64_t U64x2 __attribute__((vector_size(16)));
  const uint64_t copies = 0x0101010101010101;
  const U64x2 flags = {header[at] * copies, header[at + 1] * copies};
  const U64x2 bit = {0x8040201008040201, 0x8040201008040201};
  return add_where(q, (Bytes)flags, (Bytes)bit, value);
}
inline Bytes lookup_bytes(const int8_t* table, Bytes index) {
#if defined(__aarch64__)
  return (U8x16)vqtbl1q_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(table)), (uint8x16_t)index);
#else
  Bytes out = {};
  for (int i = 0; i < 16; ++i) {
    const Bytes here = (Bytes)(index == static_cast<uint8_t>(i));
    out |= here & static_cast<uint8_t>(table[i]);
  }
  return out;
#endif
}

inline F32 spread(const F32x8& x, int part) { return set1(x.v[part / 8][part / 2 % 4]); }
inline F32 spread(const F32x16& x, int part) { return set1(x.v[part / 4][part % 4]); }
inline F32 widened(const F32x8& x) { return x.v[0] + x.v[1]; }
template <class Narrow>
inline F32x16 widen_bytes(const Narrow* p) {  // int8_t or uint8_t
  typedef Narrow Four __attribute__((vector_size(kLanes)));
  F32x16 out;
  for (int i = 0; i < kSixteen; ++i) {
    Four four;
    std::memcpy(&four, p + i * kLanes, sizeof four);
    out.v[i] = to_f32(__builtin_convertvector(four, I32));
  }
  return out;
}
inline F32x16 widen_u8(U8x16 x) { return widen_bytes(reinterpret_cast<const uint8_t*>(&x)); }
inline F32x16 widen_s8(U8x16 x) { return widen_bytes(reinterpret_cast<const int8_t*>(&x)); }
inline F32x8 first_half(const F32x16& x) { return {{x.v[0], x.v[1]}}; }
inline F32x8 widen8_u8(U8x16 x) { return first_half(widen_u8(x)); }
inline F32x8 widen8_s8(U8x16 x) { return first_half(widen_s8(x)); }
inline F32x8 widen8_f16(U8x16 x) {
  uint16_t h[8];
  std::memcpy(h, &x, sizeof h);
  return {{load_f16(h), load_f16(h + kLanes)}};
}

// ---- rows turned round: see simd.h --------------------------------------------------------------
inline F32 f16_low(U32 x) {
  uint16_t h[kLanes];
  for (int i = 0; i < kLanes; ++i) h[i] = static_cast<uint16_t>(x[i]);
  return load_f16(h);
}
inline Words words_of_rows(const std::byte* p, int64_t stride) {
  U32 row[4];
  for (int i = 0; i < 4; ++i) row[i] = load_as<U32>(p + i * stride);
  const U32 low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const U32 high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const U32 low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const U32 high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  return {{__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
           __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
           __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
           __builtin_shufflevector(high01, high23, 2, 3, 6, 7)}};
}

inline constexpr bool kSumsPairs = true;
typedef int16_t FourSums __attribute__((vector_size(kLanes * 4)));
inline FourSums begin_fours(I32) { return FourSums{}; }
// Bytes up to 127 are the same signed and unsigned.
template <bool is_signed>
inline FourSums add_fours(FourSums sum, Bytes w, Bytes x) {
#if defined(__aarch64__)
  const int8x16_t a = (int8x16_t)w;
  const int8x16_t b = (int8x16_t)x;
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
  return sum + (FourSums)vpaddq_s16(low, vmull_high_s8(a, b));
#else
  const FourSums odd = ((FourSums)w >> 8) * ((FourSums)x >> 8);
  const FourSums even = ((FourSums)w << 8 >> 8) * ((FourSums)x << 8 >> 8);
  return sum + odd + even;
#endif
}
inline I32 end_fours(I32 sum, FourSums four) {
#if defined(__aarch64__)
  return (I32)vpadalq_s16((int32x4_t)sum, (int16x8_t)four);
#elif defined(__SSE2__)
  return sum + (I32)_mm_madd_epi16((__m128i)four, _mm_set1_epi16(1));
#else
  return sum + ((I32)four >> 16) + ((I32)four << 16 >> 16);
#endif
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
