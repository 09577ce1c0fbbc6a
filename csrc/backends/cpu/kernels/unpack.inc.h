// 256 weights of every quantized format as bytes in registers, with their scales and mins.
//
//   w[e] = scale[e / 16] * q[e] - min[e / 16]
//
// All formats come to this one form: formats with one scale per 32 elements repeat it, centred ones
// (q - 8, q - 32 ..) become a min of 8 or 32 scales, small blocks are taken eight at a time. The
// products fit float32 exactly (11 bits of d, 6 of its multiplier, 8 of q), so a decoded weight is
// rounded once, as in the scalar decoders.
#pragma once

#include "backends/cpu/simd/simd.h"
#include "quant/blocks.h"

namespace mla::cpu::MLA_ISA {
namespace {

inline constexpr int kGroup = 16;  // elements to a scale
inline constexpr int kParts = block::kSuper / static_cast<int>(sizeof(Bytes));

struct Weights {
  Bytes q[kParts];
  F32x16 scale;
  F32x16 min;  // set only if the format has_min
};

MLA_INLINE U8x16 from_words(uint64_t low, uint64_t high) {
  typedef uint64_t U64x2 __attribute__((vector_size(16)));
  return (U8x16)(U64x2{low, high});
}
MLA_INLINE U8x16 twice_low(U8x16 x) {
  return __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
}
MLA_INLINE U8x16 twice_high(U8x16 x) {
  return __builtin_shufflevector(x, x, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
}
MLA_INLINE U8x32 load32(const void* p) { return load_as<U8x32>(p); }
MLA_INLINE uint32_t word(const void* p) { return load_as<uint32_t>(p); }
// 16 packed bytes -> the low nibbles, then the high ones.
MLA_INLINE U8x32 nibbles16(const uint8_t* p) {
  const U8x16 low = load_as<U8x16>(p);
  typedef uint16_t U16x8 __attribute__((vector_size(16)));
  const U8x16 high = (U8x16)((U16x8)low >> 4);
  return concat(low & 15, high & 15);
}

// Field of eight small blocks, each twice: one per group of 16.
template <class B>
MLA_INLINE F32x16 eight_halves(const B* b, block::half B::*field) {
  typedef uint16_t U16x8 __attribute__((vector_size(16)));
  const U16x8 h = {b[0].*field, b[1].*field, b[2].*field, b[3].*field,
                   b[4].*field, b[5].*field, b[6].*field, b[7].*field};
  return widen_f16(__builtin_shufflevector(h, h, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7));
}

// ---- one per format -----------------------------------------------------------------------------
// is_signed: q is in [-128, 127]. has_min: min is to be taken off. unpack reads one super-block, or
// eight small ones.
template <class B>
struct Unpack;

template <class B, class Bits>
MLA_INLINE void small_blocks(const B* b, Bytes* q, Bits bits) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) put_pair(q, i, bits(b[2 * i]), bits(b[2 * i + 1]));
}

template <>
struct Unpack<block::Q4_0> {
  static constexpr bool is_signed = false, has_min = true;
  static MLA_INLINE void unpack(const block::Q4_0* b, Weights& w) {
    small_blocks(b, w.q, [](const block::Q4_0& x) { return nibbles16(x.qs); });
    w.scale = eight_halves(b, &block::Q4_0::d);
    w.min = 8.0f * w.scale;
  }
};

template <>
struct Unpack<block::Q4_1> {
  static constexpr bool is_signed = false, has_min = true;
  static MLA_INLINE void unpack(const block::Q4_1* b, Weights& w) {
    small_blocks(b, w.q, [](const block::Q4_1& x) { return nibbles16(x.qs); });
    w.scale = eight_halves(b, &block::Q4_1::d);
    w.min = -1.0f * eight_halves(b, &block::Q4_1::m);
  }
};

template <>
struct Unpack<block::Q5_0> {
  static constexpr bool is_signed = false, has_min = true;
  static MLA_INLINE void unpack(const block::Q5_0* b, Weights& w) {
    small_blocks(b, w.q, [](const block::Q5_0& x) {
      return nibbles16(x.qs) | bits_to_bytes(word(x.qh), 16);
    });
    w.scale = eight_halves(b, &block::Q5_0::d);
    w.min = 16.0f * w.scale;
  }
};

template <>
struct Unpack<block::Q5_1> {
  static constexpr bool is_signed = false, has_min = true;
  static MLA_INLINE void unpack(const block::Q5_1* b, Weights& w) {
    small_blocks(b, w.q, [](const block::Q5_1& x) {
      return nibbles16(x.qs) | bits_to_bytes(word(x.qh), 16);
    });
    w.scale = eight_halves(b, &block::Q5_1::d);
    w.min = -1.0f * eight_halves(b, &block::Q5_1::m);
  }
};

template <>
struct Unpack<block::Q8_0> {
  static constexpr bool is_signed = true, has_min = false;
  static MLA_INLINE void unpack(const block::Q8_0* b, Weights& w) {
    small_blocks(b, w.q, [](const block::Q8_0& x) { return load32(x.qs); });
    w.scale = eight_halves(b, &block::Q8_0::d);
  }
};

template <>
struct Unpack<block::IQ4_NL> {
  static constexpr bool is_signed = true, has_min = false;
  static MLA_INLINE void unpack(const block::IQ4_NL* b, Weights& w) {
    small_blocks(b, w.q, [](const block::IQ4_NL& x) {
      return lookup16(block::kIq4Levels, nibbles16(x.qs));
    });
    w.scale = eight_halves(b, &block::IQ4_NL::d);
  }
};

template <>
struct Unpack<block::Q2_K> {
  static constexpr bool is_signed = false, has_min = true;
  static MLA_INLINE void unpack(const block::Q2_K* b, Weights& w) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const U8x32 bits = load32(b->qs + 32 * h);
      put_pair(w.q, 2 * h, bits & 3, shift_right(bits, 2) & 3);
      put_pair(w.q, 2 * h + 1, shift_right(bits, 4) & 3, shift_right(bits, 6) & 3);
    }
    const U8x16 s = load_as<U8x16>(b->scales);
    w.scale = f16_to_f32(b->d) * widen_u8(s & 15);
    w.min = f16_to_f32(b->dmin) * widen_u8(s >> 4);
  }
};

// 16 scales of 6 bits, less 32: see block::k3_scale, here four bytes at a time.
MLA_INLINE U8x16 k3_scales(const uint8_t* s) {
  const uint32_t a = word(s), b = word(s + 4), high = word(s + 8);
  const uint32_t low4 = 0x0f0f0f0f, low2 = 0x03030303;
  const uint32_t s0 = (a & low4) | ((high & low2) << 4);
  const uint32_t s1 = (b & low4) | (((high >> 2) & low2) << 4);
  const uint32_t s2 = ((a >> 4) & low4) | (((high >> 4) & low2) << 4);
  const uint32_t s3 = ((b >> 4) & low4) | (((high >> 6) & low2) << 4);
  return from_words(s0 | static_cast<uint64_t>(s1) << 32, s2 | static_cast<uint64_t>(s3) << 32) -
         uint8_t{32};
}

template <>
struct Unpack<block::Q3_K> {
  static constexpr bool is_signed = false, has_min = true;
  static MLA_INLINE void unpack(const block::Q3_K* b, Weights& w) {
    const U8x32 mask = load32(b->hmask);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const U8x32 bits = load32(b->qs + 32 * h);
      U8x32 q[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int g = 4 * h + j;
        const U8x32 third = g < 2 ? shift_left(mask, 2 - g) : shift_right(mask, g - 2);
        q[j] = (shift_right(bits, 2 * j) & 3) | (third & 4);
      }
      put_pair(w.q, 2 * h, q[0], q[1]);
      put_pair(w.q, 2 * h + 1, q[2], q[3]);
    }
    w.scale = f16_to_f32(b->d) * widen_s8(k3_scales(b->scales));
    w.min = 4.0f * w.scale;
  }
};

// 8 scales, then 8 mins, of 6 bits: see block::k4_scale, here four bytes at a time.
MLA_INLINE U8x16 k4_scales(const uint8_t* s) {
  const uint32_t a = word(s), b = word(s + 4), c = word(s + 8);
  const uint32_t low6 = 0x3f3f3f3f, low4 = 0x0f0f0f0f, top2 = 0x30303030;
  const uint32_t s1 = (c & low4) | ((a >> 2) & top2);
  const uint32_t m1 = ((c >> 4) & low4) | ((b >> 2) & top2);
  return from_words((a & low6) | static_cast<uint64_t>(s1) << 32,
                    (b & low6) | static_cast<uint64_t>(m1) << 32);
}

template <>
struct Unpack<block::Q4_K> {
  static constexpr bool is_signed = false, has_min = true;
  static MLA_INLINE void unpack(const block::Q4_K* b, Weights& w) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const U8x32 bits = load32(b->qs + 32 * i);
      put_pair(w.q, i, bits & 15, shift_right(bits, 4) & 15);
    }
    const U8x16 s = k4_scales(b->scales);
    w.scale = f16_to_f32(b->d) * widen_u8(twice_low(s));
    w.min = f16_to_f32(b->dmin) * widen_u8(twice_high(s));
  }
};

template <>
struct Unpack<block::Q5_K> {
  static constexpr bool is_signed = false, has_min = true;
  static MLA_INLINE void unpack(const block::Q5_K* b, Weights& w) {
    const U8x32 qh = load32(b->qh);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const U8x32 bits = load32(b->qs + 32 * i);
      const int g = 2 * i;
      const U8x32 fifth0 = shift_left(shift_right(qh, g) & 1, 4);
      const U8x32 fifth1 = shift_left(shift_right(qh, g + 1) & 1, 4);
      put_pair(w.q, i, (bits & 15) | fifth0, (shift_right(bits, 4) & 15) | fifth1);
    }
    const U8x16 s = k4_scales(b->scales);
    w.scale = f16_to_f32(b->d) * widen_u8(twice_low(s));
    w.min = f16_to_f32(b->dmin) * widen_u8(twice_high(s));
  }
};

template <>
struct Unpack<block::Q6_K> {
  static constexpr bool is_signed = false, has_min = true;
  static MLA_INLINE void unpack(const block::Q6_K* b, Weights& w) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const U8x32 l0 = load32(b->ql + 64 * h);
      const U8x32 l1 = load32(b->ql + 64 * h + 32);
      const U8x32 qh = load32(b->qh + 32 * h);
      put_pair(w.q, 2 * h, (l0 & 15) | (shift_left(qh, 4) & 48),
               (l1 & 15) | (shift_left(qh, 2) & 48));
      put_pair(w.q, 2 * h + 1, (shift_right(l0, 4) & 15) | (qh & 48),
               (shift_right(l1, 4) & 15) | (shift_right(qh, 2) & 48));
    }
    w.scale = f16_to_f32(b->d) * widen_s8(load_as<U8x16>(b->scales));
    w.min = 32.0f * w.scale;
  }
};

// 8 scales of 6 bits, less 32: nibbles and bit pairs are moved apart to a byte each.
MLA_INLINE U8x16 iq4_scales(const block::IQ4_XS* b) {
  uint64_t low = word(b->scales_l);
  low = (low | low << 16) & 0x0000ffff0000ffff;
  low = (low | low << 8) & 0x00ff00ff00ff00ff;
  low = (low | low << 4) & 0x0f0f0f0f0f0f0f0f;
  uint64_t high = b->scales_h;
  high = (high | high << 24) & 0x000000ff000000ff;
  high = (high | high << 12) & 0x000f000f000f000f;
  high = (high | high << 6) & 0x0303030303030303;
  return from_words(low | high << 4, 0) - uint8_t{32};
}

template <>
struct Unpack<block::IQ4_XS> {
  static constexpr bool is_signed = true, has_min = false;
  static MLA_INLINE void unpack(const block::IQ4_XS* b, Weights& w) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      put_pair(w.q, i, lookup16(block::kIq4Levels, nibbles16(b->qs + 32 * i)),
               lookup16(block::kIq4Levels, nibbles16(b->qs + 32 * i + 16)));
    }
    w.scale = f16_to_f32(b->d) * widen_s8(twice_low(iq4_scales(b)));
  }
};

// ---- the form the kernels see -------------------------------------------------------------------
template <class B>
inline constexpr int kBlockElems = 0;
#define MLA_FORMAT(name, gguf, elems, bytes) \
  template <>                                \
  inline constexpr int kBlockElems<block::name> = elems;
#include "quant/formats.def"

template <class B>
inline constexpr bool kOffset = Unpack<B>::is_signed&& kSignedByOffset;
template <class B>
inline constexpr bool kHasMin = Unpack<B>::has_min || kOffset<B>;
// Whether q in Weights is signed.
template <class B>
inline constexpr bool kIsSigned = Unpack<B>::is_signed && !kSignedByOffset;

template <class B>
MLA_INLINE void unpack(const B* b, Weights& w) {
  Unpack<B>::unpack(b, w);
  if constexpr (kOffset<B>) {
    for (int p = 0; p < kParts; ++p) w.q[p] ^= uint8_t{0x80};
    w.min = 128.0f * w.scale;
  }
}

// The last n_elems < 256 of a row of small blocks; the rest counts as zero.
template <class B>
__attribute__((noinline)) void unpack_tail(const B* b, int64_t n_elems, Weights& w) {
  B padded[block::kSuper / kBlockElems<B>] = {};
  std::memcpy(padded, b, static_cast<size_t>(n_elems / kBlockElems<B>) * sizeof(B));
  unpack(padded, w);
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
