// 256 weights of every quantized format as bytes in registers, with their scales and mins.
//
//   w[e] = scale[group] * q[e] - min[group], groups of 32 elements or of 16
//
// All formats come to this one form: centred ones (q - 8, q - 32 ..) get a min of 8 or 32 scales,
// small blocks are taken eight at a time. The products fit float32 exactly (11 bits of d, 6 of its
// multiplier, 8 of q), so a decoded weight is rounded once, as in the scalar decoders.
//
// The order of the bytes is the format's, see simd/lanes.h: a format is described by where the 32
// bytes that hold a group of 32 begin, and how far their bits are to be shifted.
#pragma once

#include "backends/cpu/simd/simd.h"
#include "quant/blocks.h"

namespace mla::cpu::MLA_ISA {
namespace {

inline constexpr int kGroup = 32;  // elements to a scale of x
inline constexpr int kGroups = block::kSuper / kGroup;

// What the number of scales of a format decides.
template <int n_scales>
struct ScalesOf;
template <>
struct ScalesOf<8> {
  using V = F32x8;
  using Order = Paired;
};
template <>
struct ScalesOf<16> {
  using V = F32x16;
  using Order = Whole;
};

template <int n_scales>
struct Weights {
  using Order = typename ScalesOf<n_scales>::Order;
  Bytes q[kParts];
  typename ScalesOf<n_scales>::V scale;
  typename ScalesOf<n_scales>::V min;  // set only if the format has_min
};

// Where the bytes of half a group are among all parts.
template <class Order>
constexpr int place(int group, int half) {
  for (int i = 0; i < kParts; ++i) {
    for (int u = 0; u < kUnits; ++u) {
      if (Order::group(i, u) == group && Order::half(i, u) == half) return (i * kUnits + u) * 16;
    }
  }
  return -1;
}

// Part i of bytes of which a group has 32 at p + at(group).
template <class Order, class At>
MLA_INLINE Bytes gather_part(const uint8_t* p, int i, const At& at) {
  return units(p, [&](int u) { return at(Order::group(i, u)) + 16 * Order::half(i, u); });
}

typedef uint64_t BytesOf64 __attribute__((vector_size(sizeof(Bytes))));

// A number for each unit, by its group, in each of its 64-bit words.
template <class Order, class Number>
MLA_INLINE BytesOf64 by_group(int i, const Number& number) {
  BytesOf64 out = {};
#pragma GCC unroll 4
  for (int u = 0; u < kUnits; ++u) {
    out[2 * u] = out[2 * u + 1] = static_cast<uint64_t>(number(Order::group(i, u)));
  }
  return out;
}
// Shifts of all bits; the caller masks off what crosses from a neighbouring byte.
template <class Order, class Number>
MLA_INLINE Bytes shifted_right(Bytes v, int i, const Number& n) {
  return (Bytes)((BytesOf64)v >> by_group<Order>(i, n));
}
MLA_INLINE Bytes shifted_right(Bytes v, int n) { return (Bytes)((BytesOf64)v >> n); }
MLA_INLINE Bytes shifted_left(Bytes v, int n) { return (Bytes)((BytesOf64)v << n); }

// Adds `value` where byte e of 32 has bit g, for element e of group g.
template <class Order>
MLA_INLINE void add_high_bits(const uint8_t* p, Bytes* q, uint8_t value) {
#pragma GCC unroll 16
  for (int i = 0; i < kParts; ++i) {
    const Bytes bits = gather_part<Order>(p, i, [](int) { return 0; });
    const BytesOf64 bit = by_group<Order>(i, [](int g) { return 0x0101010101010101u << g; });
    q[i] = add_where(q[i], bits, (Bytes)bit, value);
  }
}

MLA_INLINE uint32_t word(const void* p) { return load_as<uint32_t>(p); }
MLA_INLINE U8x16 from_words(uint64_t low, uint64_t high) {
  typedef uint64_t U64x2 __attribute__((vector_size(16)));
  return (U8x16)(U64x2{low, high});
}

// Nibbles of which a group has 16 bytes at p + at(group), elements 16 and following the high ones.
template <class At>
MLA_INLINE void split_nibbles(const uint8_t* p, Bytes* q, const At& at) {
#pragma GCC unroll 8
  for (int i = 0; i < kParts; i += 2) {
    const Bytes both = gather_part<Paired>(p, i, at);
    q[i] = both & 15;
    q[i + 1] = shifted_right(both, 4) & 15;
  }
}

// Field of eight small blocks.
template <class B>
MLA_INLINE F32x8 eight_halves(const B* b, block::half B::*field) {
  typedef uint16_t U16x8 __attribute__((vector_size(16)));
  const U16x8 h = {b[0].*field, b[1].*field, b[2].*field, b[3].*field,
                   b[4].*field, b[5].*field, b[6].*field, b[7].*field};
  return widen8_f16((U8x16)h);
}
template <class B>
MLA_INLINE const uint8_t* bytes_of(const B* b) {
  return reinterpret_cast<const uint8_t*>(b);
}

// ---- one per format -----------------------------------------------------------------------------
// is_signed: q is in [-128, 127], else in [0, 63]. has_min: min is to be taken off. unpack reads
// one super-block, or eight small ones.
template <class B>
struct Unpack;

struct Unsigned8 {
  static constexpr bool is_signed = false, has_min = true;
  static constexpr int n_scales = 8;
};
struct Unsigned16 {
  static constexpr bool is_signed = false, has_min = true;
  static constexpr int n_scales = 16;
};
struct Signed8 {
  static constexpr bool is_signed = true, has_min = false;
  static constexpr int n_scales = 8;
};

// Where block g begins.
template <class B>
inline constexpr auto every = [](int g) { return g * static_cast<int>(sizeof(B)); };

template <class B>
MLA_INLINE void small_nibbles(const B* b, Bytes* q) {
  split_nibbles(b[0].qs, q, every<B>);
}
// Adds 16 where the fifth bit, in qh at byte `at` of the blocks, is set.
template <class B, int at>
MLA_INLINE void fifth_bits(const B* b, Bytes* q) {
#pragma GCC unroll 8
  for (int i = 0; i < kParts; i += 2) {
    const Bytes head = gather_part<Paired>(bytes_of(b), i, every<B>);
    q[i] = add_flagged<at>(q[i], head, 16);
    q[i + 1] = add_flagged<at + 2>(q[i + 1], head, 16);
  }
}

template <>
struct Unpack<block::Q4_0> : Unsigned8 {
  static MLA_INLINE void unpack(const block::Q4_0* b, Weights<8>& w) {
    small_nibbles(b, w.q);
    w.scale = eight_halves(b, &block::Q4_0::d);
    w.min = 8.0f * w.scale;
  }
};

template <>
struct Unpack<block::Q4_1> : Unsigned8 {
  static MLA_INLINE void unpack(const block::Q4_1* b, Weights<8>& w) {
    small_nibbles(b, w.q);
    w.scale = eight_halves(b, &block::Q4_1::d);
    w.min = -1.0f * eight_halves(b, &block::Q4_1::m);
  }
};

template <>
struct Unpack<block::Q5_0> : Unsigned8 {
  static MLA_INLINE void unpack(const block::Q5_0* b, Weights<8>& w) {
    small_nibbles(b, w.q);
    fifth_bits<block::Q5_0, offsetof(block::Q5_0, qh)>(b, w.q);
    w.scale = eight_halves(b, &block::Q5_0::d);
    w.min = 16.0f * w.scale;
  }
};

template <>
struct Unpack<block::Q5_1> : Unsigned8 {
  static MLA_INLINE void unpack(const block::Q5_1* b, Weights<8>& w) {
    small_nibbles(b, w.q);
    fifth_bits<block::Q5_1, offsetof(block::Q5_1, qh)>(b, w.q);
    w.scale = eight_halves(b, &block::Q5_1::d);
    w.min = -1.0f * eight_halves(b, &block::Q5_1::m);
  }
};

template <>
struct Unpack<block::Q8_0> : Signed8 {
  static MLA_INLINE void unpack(const block::Q8_0* b, Weights<8>& w) {
#pragma GCC unroll 16
    for (int i = 0; i < kParts; ++i) {
      w.q[i] = gather_part<Paired>(bytes_of(b[0].qs), i, every<block::Q8_0>);
    }
    w.scale = eight_halves(b, &block::Q8_0::d);
  }
};

template <>
struct Unpack<block::IQ4_NL> : Signed8 {
  static MLA_INLINE void unpack(const block::IQ4_NL* b, Weights<8>& w) {
    small_nibbles(b, w.q);
#pragma GCC unroll 16
    for (Bytes& q : w.q) q = lookup_bytes(block::kIq4Levels, q);
    w.scale = eight_halves(b, &block::IQ4_NL::d);
  }
};

// Part i of bits 2 * j of 32 bytes for groups j and 4 + j; the other bits are not cleared.
MLA_INLINE Bytes bit_pairs(const uint8_t* p, int i) {
  const Bytes all = gather_part<Whole>(p, i, [](int g) { return 32 * (g / 4); });
  return shifted_right<Whole>(all, i, [](int g) { return 2 * (g % 4); });
}

template <>
struct Unpack<block::Q2_K> : Unsigned16 {
  static MLA_INLINE void unpack(const block::Q2_K* b, Weights<16>& w) {
#pragma GCC unroll 16
    for (int i = 0; i < kParts; ++i) w.q[i] = bit_pairs(b->qs, i) & 3;
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
struct Unpack<block::Q3_K> : Unsigned16 {
  static MLA_INLINE void unpack(const block::Q3_K* b, Weights<16>& w) {
#pragma GCC unroll 16
    for (int i = 0; i < kParts; ++i) w.q[i] = bit_pairs(b->qs, i) & 3;
    add_high_bits<Whole>(b->hmask, w.q, 4);
    w.scale = f16_to_f32(b->d) * widen_s8(k3_scales(b->scales));
    w.min = 4.0f * w.scale;
  }
};

// 8 scales, then 8 mins, of 6 bits: see block::k4_scale, here eight bytes at a time.
MLA_INLINE void k4_scales(const uint8_t* s, U8x16& scales, U8x16& mins) {
  typedef uint32_t U32x4 __attribute__((vector_size(16)));
  const uint64_t both = load_as<uint64_t>(s), more = word(s + 8);
  const uint64_t first = both & 0x3f3f3f3f3f3f3f3f;  // scales 0 to 3, mins 0 to 3
  const uint64_t last =
      ((more | more << 28) & 0x0f0f0f0f0f0f0f0f) | ((both >> 2) & 0x3030303030303030);
  const U32x4 a = (U32x4)from_words(first, 0), b = (U32x4)from_words(last, 0);
  const U32x4 all = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  scales = (U8x16)all;
  mins = (U8x16)__builtin_shufflevector(all, all, 2, 3, 2, 3);
}

// Nibbles of which group g has the low or the high ones of 32 bytes, by g's parity.
MLA_INLINE void shared_nibbles(const uint8_t* p, Bytes* q) {
#pragma GCC unroll 16
  for (int i = 0; i < kParts; ++i) {
    const Bytes both = gather_part<Paired>(p, i, [](int g) { return 32 * (g / 2); });
    q[i] = shifted_right<Paired>(both, i, [](int g) { return 4 * (g % 2); }) & 15;
  }
}

template <>
struct Unpack<block::Q4_K> : Unsigned8 {
  static MLA_INLINE void unpack(const block::Q4_K* b, Weights<8>& w) {
    shared_nibbles(b->qs, w.q);
    U8x16 scales, mins;
    k4_scales(b->scales, scales, mins);
    w.scale = f16_to_f32(b->d) * widen8_u8(scales);
    w.min = f16_to_f32(b->dmin) * widen8_u8(mins);
  }
};

template <>
struct Unpack<block::Q5_K> : Unsigned8 {
  static MLA_INLINE void unpack(const block::Q5_K* b, Weights<8>& w) {
    shared_nibbles(b->qs, w.q);
    add_high_bits<Paired>(b->qh, w.q, 16);
    U8x16 scales, mins;
    k4_scales(b->scales, scales, mins);
    w.scale = f16_to_f32(b->d) * widen8_u8(scales);
    w.min = f16_to_f32(b->dmin) * widen8_u8(mins);
  }
};

// Bits 2 * j of groups j and 4 + j, moved to bits 4 and 5.
MLA_INLINE Bytes six_bits_high(Bytes x, int i) {
  const int j = Whole::group(i, 0) % 4;
  return j < 2 ? shifted_left(x, 4 - 2 * j) : shifted_right(x, 2 * j - 4);
}

template <>
struct Unpack<block::Q6_K> : Unsigned16 {
  static MLA_INLINE void unpack(const block::Q6_K* b, Weights<16>& w) {
#pragma GCC unroll 16
    for (int i = 0; i < kParts; ++i) {
      const Bytes low =
          gather_part<Whole>(b->ql, i, [](int g) { return 64 * (g / 4) + 32 * (g % 2); });
      const Bytes high = gather_part<Whole>(b->qh, i, [](int g) { return 32 * (g / 4); });
      w.q[i] = (shifted_right<Whole>(low, i, [](int g) { return 4 * (g % 4 / 2); }) & 15) |
               (six_bits_high(high, i) & 48);
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
struct Unpack<block::IQ4_XS> : Signed8 {
  static MLA_INLINE void unpack(const block::IQ4_XS* b, Weights<8>& w) {
    split_nibbles(b->qs, w.q, [](int g) { return 16 * g; });
#pragma GCC unroll 16
    for (Bytes& q : w.q) q = lookup_bytes(block::kIq4Levels, q);
    w.scale = f16_to_f32(b->d) * widen8_s8(iq4_scales(b));
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
inline constexpr int kScales = Unpack<B>::n_scales;
template <class B>
using WeightsOf = Weights<kScales<B>>;

template <class B>
MLA_INLINE void unpack(const B* b, WeightsOf<B>& w) {
  Unpack<B>::unpack(b, w);
  if constexpr (kOffset<B>) {
    for (Bytes& q : w.q) q ^= uint8_t{0x80};
    w.min = 128.0f * w.scale;
  }
}

// The last n_elems < 256 of a row of small blocks; the rest counts as zero.
template <class B>
__attribute__((noinline)) void unpack_tail(const B* b, int64_t n_elems, WeightsOf<B>& w) {
  B padded[block::kSuper / kBlockElems<B>] = {};
  std::memcpy(padded, b, static_cast<size_t>(n_elems / kBlockElems<B>) * sizeof(B));
  unpack(padded, w);
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
