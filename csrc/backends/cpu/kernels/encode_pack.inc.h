// Encoded numbers of sixteen runs -> the bytes of blocks.h. Loops over whole bytes, in the order
// in which they lie, so that compilers turn them into vector code.
#pragma once

#include "backends/cpu/kernels/encode_lanes.inc.h"
#include "quant/blocks.h"

namespace mla::cpu::MLA_ISA {
namespace {

// One block's share of sixteen encoded runs.
struct Codes {
  const uint8_t* q;  // [elems of the block], as stored: without sign
  const uint8_t* s;  // [groups] multiplier of the scale; signed ones as two's complement
  const uint8_t* m;  // [groups] multiplier of the min
  uint16_t d, dmin;  // binary16
};

MLA_INLINE uint8_t byte(int x) { return static_cast<uint8_t>(x); }

// Element l < 16 in the low nibble of qs[l], element l + 16 in the high one.
MLA_INLINE void pack_small_nibbles(const uint8_t* q, uint8_t* qs) {
  for (int l = 0; l < 16; ++l) qs[l] = byte((q[l] & 15) | (q[l + 16] << 4));
}
// Bit 4 of element e is bit e of qh.
MLA_INLINE void pack_fifth_bits(const uint8_t* q, uint8_t* qh) {
  for (int i = 0; i < 4; ++i) {
    int bits = 0;
    for (int j = 0; j < 8; ++j) bits |= ((q[8 * i + j] >> 4) & 1) << j;
    qh[i] = byte(bits);
  }
}
// Bits 2j, 2j+1 of qs[32h + l] are two bits of element 128h + 32j + l.
MLA_INLINE void pack_two_bits(const uint8_t* q, int shift, uint8_t* qs) {
  for (int h = 0; h < 2; ++h, q += 128, qs += 32) {
    for (int l = 0; l < 32; ++l) {
      qs[l] = byte(((q[l] >> shift) & 3) | (((q[32 + l] >> shift) & 3) << 2) |
                   (((q[64 + l] >> shift) & 3) << 4) | (((q[96 + l] >> shift) & 3) << 6));
    }
  }
}
// Groups 2i and 2i+1 of 32: low and high nibbles of qs[32i + l].
MLA_INLINE void pack_k4_nibbles(const uint8_t* q, uint8_t* qs) {
  for (int i = 0; i < 4; ++i, q += 64, qs += 32) {
    for (int l = 0; l < 32; ++l) qs[l] = byte((q[l] & 15) | (q[32 + l] << 4));
  }
}
// Six-bit multipliers of eight groups: see k4_scale and k4_min.
MLA_INLINE void pack_k4_scales(const uint8_t* s, const uint8_t* m, uint8_t* scales) {
  for (int g = 0; g < 4; ++g) {
    scales[g] = byte(s[g] | ((s[g + 4] >> 4) << 6));
    scales[g + 4] = byte(m[g] | ((m[g + 4] >> 4) << 6));
    scales[g + 8] = byte((s[g + 4] & 15) | ((m[g + 4] & 15) << 4));
  }
}
// Bit g of out[l] is the bit of element 32g + l at `shift`.
MLA_INLINE void pack_bit_planes(const uint8_t* q, int shift, uint8_t* out) {
  for (int l = 0; l < 32; ++l) {
    int bits = 0;
    for (int g = 0; g < 8; ++g) bits |= ((q[32 * g + l] >> shift) & 1) << g;
    out[l] = byte(bits);
  }
}

MLA_INLINE void pack(const Codes& c, block::Q4_0& out) {
  out.d = c.d;
  pack_small_nibbles(c.q, out.qs);
}
MLA_INLINE void pack(const Codes& c, block::Q4_1& out) {
  out.d = c.d;
  out.m = c.dmin;
  pack_small_nibbles(c.q, out.qs);
}
MLA_INLINE void pack(const Codes& c, block::Q5_0& out) {
  out.d = c.d;
  pack_small_nibbles(c.q, out.qs);
  pack_fifth_bits(c.q, out.qh);
}
MLA_INLINE void pack(const Codes& c, block::Q5_1& out) {
  out.d = c.d;
  out.m = c.dmin;
  pack_small_nibbles(c.q, out.qs);
  pack_fifth_bits(c.q, out.qh);
}
MLA_INLINE void pack(const Codes& c, block::Q8_0& out) {
  out.d = c.d;
  std::memcpy(out.qs, c.q, sizeof out.qs);
}
MLA_INLINE void pack(const Codes& c, block::IQ4_NL& out) {
  out.d = c.d;
  pack_small_nibbles(c.q, out.qs);
}

MLA_INLINE void pack(const Codes& c, block::Q2_K& out) {
  out.d = c.d;
  out.dmin = c.dmin;
  for (int g = 0; g < 16; ++g) out.scales[g] = byte(c.s[g] | (c.m[g] << 4));
  pack_two_bits(c.q, 0, out.qs);
}
MLA_INLINE void pack(const Codes& c, block::Q3_K& out) {
  out.d = c.d;
  uint8_t s[16];
  for (int g = 0; g < 16; ++g) s[g] = byte(c.s[g] + 32);
  for (int g = 0; g < 8; ++g) out.scales[g] = byte((s[g] & 15) | ((s[g + 8] & 15) << 4));
  for (int g = 0; g < 4; ++g) {
    out.scales[8 + g] = byte((s[g] >> 4) | ((s[g + 4] >> 4) << 2) | ((s[g + 8] >> 4) << 4) |
                             ((s[g + 12] >> 4) << 6));
  }
  pack_two_bits(c.q, 0, out.qs);
  pack_bit_planes(c.q, 2, out.hmask);
}
MLA_INLINE void pack(const Codes& c, block::Q4_K& out) {
  out.d = c.d;
  out.dmin = c.dmin;
  pack_k4_scales(c.s, c.m, out.scales);
  pack_k4_nibbles(c.q, out.qs);
}
MLA_INLINE void pack(const Codes& c, block::Q5_K& out) {
  out.d = c.d;
  out.dmin = c.dmin;
  pack_k4_scales(c.s, c.m, out.scales);
  pack_k4_nibbles(c.q, out.qs);
  pack_bit_planes(c.q, 4, out.qh);
}
MLA_INLINE void pack(const Codes& c, block::Q6_K& out) {
  out.d = c.d;
  std::memcpy(out.scales, c.s, sizeof out.scales);
  pack_two_bits(c.q, 4, out.qh);
  for (int h = 0; h < 2; ++h) {
    const uint8_t* q = c.q + 128 * h;
    for (int l = 0; l < 64; ++l) out.ql[64 * h + l] = byte((q[l] & 15) | (q[l + 64] << 4));
  }
}
MLA_INLINE void pack(const Codes& c, block::IQ4_XS& out) {
  out.d = c.d;
  int high = 0;
  for (int g = 0; g < 8; ++g) {
    high |= (byte(c.s[g] + 32) >> 4) << (2 * g);
    pack_small_nibbles(c.q + 32 * g, out.qs + 16 * g);
  }
  out.scales_h = static_cast<uint16_t>(high);
  for (int i = 0; i < 4; ++i) {
    out.scales_l[i] = byte((byte(c.s[2 * i] + 32) & 15) | (byte(c.s[2 * i + 1] + 32) << 4));
  }
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
