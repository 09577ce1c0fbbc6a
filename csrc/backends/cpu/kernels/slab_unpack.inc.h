// Rows of quantized weights as a slab: one row per lane, for the kernel in slab.inc.cpp.
//
// 256 weights of kSlabRows rows are
//   q      [64][kSlabVectors][kLanes][4] bytes: four neighbours of a row fill one lane
//   scale  [8 * halves][kSlabVectors][kLanes] floats, of groups of 32, or of 16 in two halves
//   min    the same, only if has_min
// and stand for w = scale * (q - centre), or scale * q - min.
//
// Formats keep neighbouring weights in neighbouring bytes, so blocks are turned round first, 16
// bytes of each row at a time, and taken apart afterwards: one instruction then serves all rows,
// for scales as well, whose extraction is most of the work row by row.
#pragma once

#include <cstddef>

#include "backends/cpu/simd/simd.h"
#include "quant/blocks.h"

namespace mla::cpu::MLA_ISA {
namespace {

inline constexpr int kSlabVectors = 2;  // registers of rows: each broadcast of x meets both
inline constexpr int kSlabRows = kSlabVectors * kLanes;
inline constexpr int kSlabGroup = 32;
inline constexpr int kSlabGroups = block::kSuper / kSlabGroup;
inline constexpr int kSlabWords = block::kSuper / 4;  // of four weights

// One super-block of kLanes rows, p in the first of them.
struct RawRows {
  const std::byte* p;
  int64_t stride;
  MLA_INLINE Words at(int64_t offset) const { return words_of_rows(p + offset, stride); }
};

// Where one register of rows goes within the slab of 256 weights.
struct SlabOut {
  std::byte* q;
  float* scale;
  float* min;
  MLA_INLINE void put(int word, U32 x) const {
    std::memcpy(q + word * kSlabVectors * sizeof(Bytes), &x, sizeof x);
  }
  MLA_INLINE void put_scale(int group, F32 x) const {
    store(scale + group * kSlabVectors * kLanes, x);
  }
  MLA_INLINE void put_min(int group, F32 x) const { store(min + group * kSlabVectors * kLanes, x); }
};

inline constexpr uint32_t kLow4 = 0x0f0f0f0f;
inline constexpr uint32_t kSignBits = 0x80808080;  // bytes: signed to plus 128, and back

MLA_INLINE F32 byte_of(U32 x, int i) { return to_f32((I32)(x >> (8 * i) & 255)); }
MLA_INLINE F32 signed_byte_of(U32 x, int i) { return to_f32((I32)(x << (24 - 8 * i)) >> 24); }
// Bits 4 word .. 4 word + 3 of x, one to a byte, as its bit 4: they meet no carries.
MLA_INLINE U32 fifth_bits_of(U32 x, int word) {
  return (x >> (4 * word) & 15) * 0x02040810u & 0x10101010u;
}

// ---- one per format -----------------------------------------------------------------------------
// largest: of q, as an unsigned number, or as a magnitude if is_signed.
template <int n_halves, int centre_, bool has_min_, int largest_, bool is_signed_ = false>
struct SlabForm {
  static constexpr int halves = n_halves, centre = centre_, largest = largest_;
  static constexpr bool has_min = has_min_, is_signed = is_signed_;
};
using SlabSigned = SlabForm<1, kSignedByOffset ? 128 : 0, false, 128, !kSignedByOffset>;

template <class B>
struct Slab;

// Small blocks: head(words 0 and 1 of the block, b), nibbles(word of the low ones, word, bits).
template <class B, class Head, class Word>
MLA_INLINE void small_slab(const RawRows& rows, const SlabOut& out, const Head& head,
                           const Word& word) {
  for (int b = 0; b < kSlabGroups; ++b) {
    const int64_t at = b * static_cast<int64_t>(sizeof(B));
    const U32 bits = head(rows.at(at), b);
    const Words qs = rows.at(at + static_cast<int64_t>(offsetof(B, qs)));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      out.put(8 * b + j, word(qs.w[j] & kLow4, bits, j));
      out.put(8 * b + 4 + j, word(qs.w[j] >> 4 & kLow4, bits, j + 4));
    }
  }
}

template <>
struct Slab<block::Q4_0> : SlabForm<1, 8, false, 15> {
  static MLA_INLINE void unpack(const RawRows& rows, const SlabOut& out) {
    small_slab<block::Q4_0>(
        rows, out,
        [&](const Words& h, int b) {
          out.put_scale(b, f16_low(h.w[0]));
          return U32{};
        },
        [](U32 q, U32, int) { return q; });
  }
};

template <>
struct Slab<block::Q4_1> : SlabForm<1, 0, true, 15> {
  static MLA_INLINE void unpack(const RawRows& rows, const SlabOut& out) {
    small_slab<block::Q4_1>(
        rows, out,
        [&](const Words& h, int b) {
          out.put_scale(b, f16_low(h.w[0]));
          out.put_min(b, zero() - f16_low(h.w[0] >> 16));
          return U32{};
        },
        [](U32 q, U32, int) { return q; });
  }
};

template <>
struct Slab<block::Q5_0> : SlabForm<1, 16, false, 31> {
  static MLA_INLINE void unpack(const RawRows& rows, const SlabOut& out) {
    small_slab<block::Q5_0>(
        rows, out,
        [&](const Words& h, int b) {
          out.put_scale(b, f16_low(h.w[0]));
          return h.w[0] >> 16 | h.w[1] << 16;
        },
        [](U32 q, U32 bits, int j) { return q | fifth_bits_of(bits, j); });
  }
};

template <>
struct Slab<block::Q5_1> : SlabForm<1, 0, true, 31> {
  static MLA_INLINE void unpack(const RawRows& rows, const SlabOut& out) {
    small_slab<block::Q5_1>(
        rows, out,
        [&](const Words& h, int b) {
          out.put_scale(b, f16_low(h.w[0]));
          out.put_min(b, zero() - f16_low(h.w[0] >> 16));
          return h.w[1];
        },
        [](U32 q, U32 bits, int j) { return q | fifth_bits_of(bits, j); });
  }
};

template <>
struct Slab<block::IQ4_NL> : SlabSigned {
  static MLA_INLINE void unpack(const RawRows& rows, const SlabOut& out) {
    small_slab<block::IQ4_NL>(
        rows, out,
        [&](const Words& h, int b) {
          out.put_scale(b, f16_low(h.w[0]));
          return U32{};
        },
        [](U32 q, U32, int) {
          const U32 level = (U32)lookup_bytes(block::kIq4Levels, (Bytes)q);
          return kSignedByOffset ? level ^ kSignBits : level;
        });
  }
};

template <>
struct Slab<block::Q8_0> : SlabSigned {
  static MLA_INLINE void unpack(const RawRows& rows, const SlabOut& out) {
    for (int b = 0; b < kSlabGroups; ++b) {
      const int64_t at = b * static_cast<int64_t>(sizeof(block::Q8_0));
      out.put_scale(b, f16_low(rows.at(at).w[0]));
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Words qs = rows.at(at + 2 + 16 * i);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          out.put(8 * b + 4 * i + j, kSignedByOffset ? qs.w[j] ^ kSignBits : qs.w[j]);
        }
      }
    }
  }
};

template <>
struct Slab<block::Q2_K> : SlabForm<2, 0, true, 3> {
  static MLA_INLINE void unpack(const RawRows& rows, const SlabOut& out) {
    const uint32_t low2 = 0x03030303;
    for (int i = 0; i < 4; ++i) {  // words 4i .. of qs, eight to a half of 128 weights
      const Words qs = rows.at(16 + 16 * i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) {
          out.put(32 * (i / 2) + 8 * j + 4 * (i & 1) + w, qs.w[w] >> (2 * j) & low2);
        }
      }
    }
    const Words s = rows.at(0);
    const Words tail = rows.at(68);
    const F32 d = f16_low(tail.w[3]), dmin = f16_low(tail.w[3] >> 16);
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
      out.put_scale(g, d * byte_of(s.w[g / 4] & kLow4, g & 3));
      out.put_min(g, dmin * byte_of(s.w[g / 4] >> 4 & kLow4, g & 3));
    }
  }
};

template <>
struct Slab<block::Q3_K> : SlabForm<2, 4, false, 7> {
  static MLA_INLINE void unpack(const RawRows& rows, const SlabOut& out) {
    const uint32_t low2 = 0x03030303, third = 0x04040404;
    const Words mask[2] = {rows.at(0), rows.at(16)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Words qs = rows.at(32 + 16 * i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int bit = 4 * (i / 2) + j;
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) {
          const U32 m = mask[i & 1].w[w];
          const U32 high = (bit < 2 ? m << (2 - bit) : m >> (bit - 2)) & third;
          out.put(32 * (i / 2) + 8 * j + 4 * (i & 1) + w, (qs.w[w] >> (2 * j) & low2) | high);
        }
      }
    }
    put_scales(rows.at(94), out);
  }
  // Words from two bytes before the scales on: they end with d.
  static MLA_INLINE void put_scales(const Words& t, const SlabOut& out) {
    const uint32_t low2 = 0x03030303;
    const U32 a = t.w[0] >> 16 | t.w[1] << 16;
    const U32 b = t.w[1] >> 16 | t.w[2] << 16;
    const U32 high = t.w[2] >> 16 | t.w[3] << 16;
    const F32 d = f16_low(t.w[3] >> 16);
    const U32 s[4] = {(a & kLow4) | (high & low2) << 4, (b & kLow4) | (high >> 2 & low2) << 4,
                      (a >> 4 & kLow4) | (high >> 4 & low2) << 4,
                      (b >> 4 & kLow4) | (high >> 6 & low2) << 4};
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
      out.put_scale(g, d * (byte_of(s[g / 4], g & 3) - set1(32.0f)));
    }
  }
};

// Scales and mins of Q4_K and Q5_K, from their first four words.
MLA_INLINE void put_k4_scales(const Words& h, const SlabOut& out) {
  const uint32_t low6 = 0x3f3f3f3f, top2 = 0x30303030;
  const F32 d = f16_low(h.w[0]), dmin = f16_low(h.w[0] >> 16);
  const U32 a = h.w[1], b = h.w[2], c = h.w[3];
  const U32 s[2] = {a & low6, (c & kLow4) | (a >> 2 & top2)};
  const U32 m[2] = {b & low6, (c >> 4 & kLow4) | (b >> 2 & top2)};
#pragma GCC unroll 8
  for (int g = 0; g < 8; ++g) {
    out.put_scale(g, d * byte_of(s[g / 4], g & 3));
    out.put_min(g, dmin * byte_of(m[g / 4], g & 3));
  }
}

template <>
struct Slab<block::Q4_K> : SlabForm<1, 0, true, 15> {
  static MLA_INLINE void unpack(const RawRows& rows, const SlabOut& out) {
    put_k4_scales(rows.at(0), out);
    for (int i = 0; i < 8; ++i) {
      const Words qs = rows.at(16 + 16 * i);
      const int word = 16 * (i / 2) + 4 * (i & 1);
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) {
        out.put(word + w, qs.w[w] & kLow4);
        out.put(word + 8 + w, qs.w[w] >> 4 & kLow4);
      }
    }
  }
};

template <>
struct Slab<block::Q5_K> : SlabForm<1, 0, true, 31> {
  static MLA_INLINE void unpack(const RawRows& rows, const SlabOut& out) {
    put_k4_scales(rows.at(0), out);
    const uint32_t one = 0x01010101;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Words qh = rows.at(16 + 16 * half);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Words qs = rows.at(48 + 32 * i + 16 * half);
        const int word = 16 * i + 4 * half;
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) {
          out.put(word + w, (qs.w[w] & kLow4) | (qh.w[w] >> (2 * i) & one) << 4);
          out.put(word + 8 + w, (qs.w[w] >> 4 & kLow4) | (qh.w[w] >> (2 * i + 1) & one) << 4);
        }
      }
    }
  }
};

template <>
struct Slab<block::Q6_K> : SlabForm<2, 32, false, 63> {
  static MLA_INLINE void unpack(const RawRows& rows, const SlabOut& out) {
    const uint32_t top2 = 0x30303030;
    for (int i = 0; i < 4; ++i) {  // words 4 (i & 1) .. of half i / 2
      const int64_t ql = 64 * (i / 2) + 16 * (i & 1);
      const Words l0 = rows.at(ql), l1 = rows.at(ql + 32);
      const Words qh = rows.at(128 + 32 * (i / 2) + 16 * (i & 1));
      const int word = 32 * (i / 2) + 4 * (i & 1);
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) {
        out.put(word + w, (l0.w[w] & kLow4) | (qh.w[w] << 4 & top2));
        out.put(word + 8 + w, (l1.w[w] & kLow4) | (qh.w[w] << 2 & top2));
        out.put(word + 16 + w, (l0.w[w] >> 4 & kLow4) | (qh.w[w] & top2));
        out.put(word + 24 + w, (l1.w[w] >> 4 & kLow4) | (qh.w[w] >> 2 & top2));
      }
    }
    const Words s = rows.at(192);
    const F32 d = f16_low(rows.at(194).w[3] >> 16);
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) out.put_scale(g, d * signed_byte_of(s.w[g / 4], g & 3));
  }
};

template <>
struct Slab<block::IQ4_XS> : SlabSigned {
  static MLA_INLINE void unpack(const RawRows& rows, const SlabOut& out) {
    const Words h = rows.at(0);
    const F32 d = f16_low(h.w[0]);
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      const U32 s = (h.w[1] >> (4 * g) & 15) | (h.w[0] >> (16 + 2 * g) & 3) << 4;
      out.put_scale(g, d * (to_f32((I32)s) - set1(32.0f)));
    }
    for (int g = 0; g < 8; ++g) {
      const Words qs = rows.at(8 + 16 * g);
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) {
        out.put(8 * g + w, level(qs.w[w] & kLow4));
        out.put(8 * g + 4 + w, level(qs.w[w] >> 4 & kLow4));
      }
    }
  }
  static MLA_INLINE U32 level(U32 q) {
    const U32 x = (U32)lookup_bytes(block::kIq4Levels, (Bytes)q);
    return kSignedByOffset ? x ^ kSignBits : x;
  }
};

}  // namespace
}  // namespace mla::cpu::MLA_ISA
