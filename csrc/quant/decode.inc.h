// Scalar decoding of one block per quantized format: the reference that every faster decoder is
// tested against, and the code other devices share.
//
// A device's compiler defines MLA_DEVICE to its function qualifier, and MLA_HALF_TO_FLOAT to its
// own conversion. All functions are static, so each translation unit keeps its own copy: code
// compiled for one instruction set is never linked into another's.
#pragma once

#include "quant/blocks.h"

#ifndef MLA_DEVICE
#define MLA_DEVICE
#endif
#ifndef MLA_HALF_TO_FLOAT
#include "base/half.h"
#define MLA_HALF_TO_FLOAT(bits) ::mla::half_to_float(bits)
#endif

namespace mla::block {

// Scale of group i (of 16) of a Q3_K block, before 32 is taken off: low nibbles of the first eight
// bytes, then high nibbles; the two high bits from the last four bytes.
MLA_DEVICE static inline int k3_scale(const uint8_t* scales, int i) {
  const int low = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4;
  const int high = (scales[8 + (i & 3)] >> (2 * (i >> 2))) & 3;
  return low | (high << 4);
}

// Scale and min of group g (of 8) of a Q4_K or Q5_K block: 6 bits in bytes 0-3 and 4-7 for the
// first four groups; nibbles of bytes 8-11 for the others, whose high bits top bytes 0-3 and 4-7.
MLA_DEVICE static inline int k4_scale(const uint8_t* scales, int g) {
  return g < 4 ? scales[g] & 63 : (scales[g + 4] & 15) | ((scales[g - 4] >> 6) << 4);
}
MLA_DEVICE static inline int k4_min(const uint8_t* scales, int g) {
  return g < 4 ? scales[g + 4] & 63 : (scales[g + 4] >> 4) | ((scales[g] >> 6) << 4);
}

MLA_DEVICE static inline int iq4_scale(const IQ4_XS& b, int g) {
  const int low = (b.scales_l[g / 2] >> (4 * (g & 1))) & 15;
  return low | (((b.scales_h >> (2 * g)) & 3) << 4);
}

MLA_DEVICE static inline uint32_t fifth_bits(const uint8_t* qh) {
  return qh[0] | (qh[1] << 8) | (qh[2] << 16) | (static_cast<uint32_t>(qh[3]) << 24);
}

// out[0 .. elems of the block)
MLA_DEVICE static inline void decode_block(const Q4_0& b, float* out) {
  const float d = MLA_HALF_TO_FLOAT(b.d);
  for (int l = 0; l < 16; ++l) {
    out[l] = d * static_cast<float>((b.qs[l] & 15) - 8);
    out[l + 16] = d * static_cast<float>((b.qs[l] >> 4) - 8);
  }
}

MLA_DEVICE static inline void decode_block(const Q4_1& b, float* out) {
  const float d = MLA_HALF_TO_FLOAT(b.d);
  const float m = MLA_HALF_TO_FLOAT(b.m);
  for (int l = 0; l < 16; ++l) {
    out[l] = d * static_cast<float>(b.qs[l] & 15) + m;
    out[l + 16] = d * static_cast<float>(b.qs[l] >> 4) + m;
  }
}

MLA_DEVICE static inline void decode_block(const Q5_0& b, float* out) {
  const float d = MLA_HALF_TO_FLOAT(b.d);
  const uint32_t qh = fifth_bits(b.qh);
  for (int l = 0; l < 16; ++l) {
    const int low = (b.qs[l] & 15) | static_cast<int>(((qh >> l) & 1) << 4);
    const int high = (b.qs[l] >> 4) | static_cast<int>(((qh >> (l + 16)) & 1) << 4);
    out[l] = d * static_cast<float>(low - 16);
    out[l + 16] = d * static_cast<float>(high - 16);
  }
}

MLA_DEVICE static inline void decode_block(const Q5_1& b, float* out) {
  const float d = MLA_HALF_TO_FLOAT(b.d);
  const float m = MLA_HALF_TO_FLOAT(b.m);
  const uint32_t qh = fifth_bits(b.qh);
  for (int l = 0; l < 16; ++l) {
    const int low = (b.qs[l] & 15) | static_cast<int>(((qh >> l) & 1) << 4);
    const int high = (b.qs[l] >> 4) | static_cast<int>(((qh >> (l + 16)) & 1) << 4);
    out[l] = d * static_cast<float>(low) + m;
    out[l + 16] = d * static_cast<float>(high) + m;
  }
}

MLA_DEVICE static inline void decode_block(const Q8_0& b, float* out) {
  const float d = MLA_HALF_TO_FLOAT(b.d);
  for (int l = 0; l < 32; ++l) out[l] = d * static_cast<float>(b.qs[l]);
}

MLA_DEVICE static inline void decode_block(const IQ4_NL& b, float* out) {
  const float d = MLA_HALF_TO_FLOAT(b.d);
  for (int l = 0; l < 16; ++l) {
    out[l] = d * static_cast<float>(kIq4Levels[b.qs[l] & 15]);
    out[l + 16] = d * static_cast<float>(kIq4Levels[b.qs[l] >> 4]);
  }
}

MLA_DEVICE static inline void decode_block(const Q2_K& b, float* out) {
  const float d = MLA_HALF_TO_FLOAT(b.d);
  const float dmin = MLA_HALF_TO_FLOAT(b.dmin);
  for (int e = 0; e < kSuper; ++e) {
    const int h = e / 128, j = (e / 32) & 3, l = e & 31;
    const float s = d * static_cast<float>(b.scales[e / 16] & 15);
    const float m = dmin * static_cast<float>(b.scales[e / 16] >> 4);
    out[e] = s * static_cast<float>((b.qs[32 * h + l] >> (2 * j)) & 3) - m;
  }
}

MLA_DEVICE static inline void decode_block(const Q3_K& b, float* out) {
  const float d = MLA_HALF_TO_FLOAT(b.d);
  for (int e = 0; e < kSuper; ++e) {
    const int h = e / 128, j = (e / 32) & 3, l = e & 31;
    const float s = d * static_cast<float>(k3_scale(b.scales, e / 16) - 32);
    const int q = ((b.qs[32 * h + l] >> (2 * j)) & 3) | (((b.hmask[l] >> (4 * h + j)) & 1) << 2);
    out[e] = s * static_cast<float>(q - 4);
  }
}

MLA_DEVICE static inline void decode_block(const Q4_K& b, float* out) {
  const float d = MLA_HALF_TO_FLOAT(b.d);
  const float dmin = MLA_HALF_TO_FLOAT(b.dmin);
  for (int g = 0; g < 8; ++g) {
    const float s = d * static_cast<float>(k4_scale(b.scales, g));
    const float m = dmin * static_cast<float>(k4_min(b.scales, g));
    for (int l = 0; l < 32; ++l) {
      const int q = (b.qs[32 * (g / 2) + l] >> (4 * (g & 1))) & 15;
      out[32 * g + l] = s * static_cast<float>(q) - m;
    }
  }
}

MLA_DEVICE static inline void decode_block(const Q5_K& b, float* out) {
  const float d = MLA_HALF_TO_FLOAT(b.d);
  const float dmin = MLA_HALF_TO_FLOAT(b.dmin);
  for (int g = 0; g < 8; ++g) {
    const float s = d * static_cast<float>(k4_scale(b.scales, g));
    const float m = dmin * static_cast<float>(k4_min(b.scales, g));
    for (int l = 0; l < 32; ++l) {
      const int low = (b.qs[32 * (g / 2) + l] >> (4 * (g & 1))) & 15;
      const int q = low | (((b.qh[l] >> g) & 1) << 4);
      out[32 * g + l] = s * static_cast<float>(q) - m;
    }
  }
}

MLA_DEVICE static inline void decode_block(const Q6_K& b, float* out) {
  const float d = MLA_HALF_TO_FLOAT(b.d);
  for (int e = 0; e < kSuper; ++e) {
    const int h = e / 128, j = (e / 32) & 3, l = e & 31;
    const int low = (b.ql[64 * h + 32 * (j & 1) + l] >> (4 * (j >> 1))) & 15;
    const int q = low | (((b.qh[32 * h + l] >> (2 * j)) & 3) << 4);
    out[e] = d * static_cast<float>(b.scales[e / 16]) * static_cast<float>(q - 32);
  }
}

MLA_DEVICE static inline void decode_block(const IQ4_XS& b, float* out) {
  const float d = MLA_HALF_TO_FLOAT(b.d);
  for (int g = 0; g < 8; ++g) {
    const float s = d * static_cast<float>(iq4_scale(b, g) - 32);
    for (int l = 0; l < 16; ++l) {
      const uint8_t packed = b.qs[16 * g + l];
      out[32 * g + l] = s * static_cast<float>(kIq4Levels[packed & 15]);
      out[32 * g + l + 16] = s * static_cast<float>(kIq4Levels[packed >> 4]);
    }
  }
}

}  // namespace mla::block
