// The bytes of one block of each quantized format: what the bits mean and where they lie.
//
// `half` fields hold IEEE binary16 bits. q is the stored integer of element e, s a scale, m a min.
// Every block starts at an even address, which is all the alignment its fields need.
#pragma once

#include <cstdint>

#include "quant/format.h"

namespace mla::block {

using half = uint16_t;

// Elements that share one block in the formats with super-blocks.
static constexpr int kSuper = 256;
static constexpr int kSmall = 32;

// Small blocks keep element l < 16 in the low nibble of qs[l], element l + 16 in the high one.

struct Q4_0 {  // d * (q - 8)
  half d;
  uint8_t qs[16];
};
struct Q4_1 {  // d * q + m
  half d, m;
  uint8_t qs[16];
};
struct Q5_0 {  // d * (q - 16); bit e of qh (little-endian) is q's fifth bit
  half d;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct Q5_1 {  // d * q + m
  half d, m;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct Q8_0 {  // d * q
  half d;
  int8_t qs[32];
};
struct IQ4_NL {  // d * kIq4Levels[q]
  half d;
  uint8_t qs[16];
};

// Super-blocks of 256: e = 128 * h + 32 * j + l with l < 32, or e = 32 * g + l.

struct Q2_K {  // d * s * q - dmin * m; group e / 16: s the low, m the high nibble of scales[group]
  uint8_t scales[16];
  uint8_t qs[64];  // q = bits 2j, 2j+1 of qs[32h + l]
  half d, dmin;
};
struct Q3_K {          // d * (s - 32) * (q - 4), s of 6 bits per group e / 16, see k3_scale
  uint8_t hmask[32];   // q's third bit: bit 4h + j of hmask[l]
  uint8_t qs[64];      // its low bits, as in Q2_K
  uint8_t scales[12];  // 16 of 6 bits
  half d;
};
struct Q4_K {  // d * s * q - dmin * m, s and m of 6 bits per group e / 32, see k4_scale, k4_min
  half d, dmin;
  uint8_t scales[12];
  uint8_t qs[128];  // groups 2i and 2i+1: low and high nibbles of qs[32i + l]
};
struct Q5_K {  // as Q4_K
  half d, dmin;
  uint8_t scales[12];
  uint8_t qh[32];  // q's fifth bit: bit g of qh[l]
  uint8_t qs[128];
};
struct Q6_K {       // d * s * (q - 32), s per group e / 16
  uint8_t ql[128];  // q's low 4 bits: ql[64h + 32(j & 1) + l], low nibble for j < 2
  uint8_t qh[64];   // its high 2: bits 2j, 2j+1 of qh[32h + l]
  int8_t scales[16];
  half d;
};
struct IQ4_XS {  // d * (s - 32) * kIq4Levels[q], s of 6 bits per group e / 32
  half d;
  uint16_t scales_h;    // bits 2g, 2g+1: the high bits of s
  uint8_t scales_l[4];  // nibble g: the low bits
  uint8_t qs[128];      // group g in qs[16g ..], ordered as in the small blocks
};

// The sixteen levels of the non-linear 4-bit formats, denser around zero.
static constexpr int8_t kIq4Levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113};

#define MLA_FORMAT(name, gguf, elems, bytes)                              \
  static_assert(sizeof(name) == (bytes), #name ": block size");           \
  static_assert((elems) == kSmall || (elems) == kSuper, #name ": elems"); \
  static_assert(alignof(name) <= 2, #name ": blocks may lie at any even address");
#include "quant/formats.def"

}  // namespace mla::block
