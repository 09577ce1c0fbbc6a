// Super-blocks of 256 elements: groups with scales that are themselves integers.
#include <algorithm>
#include <cstring>

#include "quant/encode_blocks.h"
#include "quant/encode_fit.h"

namespace mla::block {
namespace {

// The bytes of blocks.h are filled by |=, so they start as zeros.
template <class Block>
void clear(Block& out) {
  std::memset(&out, 0, sizeof(out));
}
void put(uint8_t& byte, int bits) { byte = static_cast<uint8_t>(byte | bits); }

// d * s * q - dmin * m: s and m in [0, kScaleMax], q in [0, kHighest], per group.
template <int kGroups, int kHighest, int kScaleMax>
struct AffineGroups {
  static constexpr int kElems = kSuper / kGroups;
  StoredScale d, dmin;
  int s[kGroups], m[kGroups];
  int q[kSuper];

  AffineGroups(const float* x, int exponent) {
    fit::Affine found[kGroups];
    float widest = 0;
    float deepest = 0;
    for (int g = 0; g < kGroups; ++g) {
      found[g] = fit::affine(x + g * kElems, kElems, kHighest, true);
      widest = std::max(widest, found[g].scale);
      deepest = std::max(deepest, -found[g].min);
    }
    d = store_scale(widest / kScaleMax, exponent);
    dmin = store_scale(deepest / kScaleMax, exponent);
    for (int g = 0; g < kGroups; ++g) {
      s[g] = fit::nearest(found[g].scale, d.value, 0, kScaleMax);
      m[g] = fit::nearest(-found[g].min, dmin.value, 0, kScaleMax);
      const float scale = d.value * static_cast<float>(s[g]);
      const float min = dmin.value * static_cast<float>(m[g]);
      for (int e = g * kElems; e < (g + 1) * kElems; ++e) {
        q[e] = fit::nearest(x[e] + min, scale, 0, kHighest);
      }
    }
  }
};

// d * s * (level of q): s in [kScaleLowest, -kScaleLowest - 1] per group. How a group's scale is
// found, and an element's q under a scale, is the caller's.
template <int kGroups, int kScaleLowest>
struct SignedGroups {
  static constexpr int kElems = kSuper / kGroups;
  StoredScale d;
  int s[kGroups];
  int q[kSuper];

  template <class FitScale, class Choose>
  SignedGroups(const float* x, int exponent, FitScale fit_scale, Choose choose) {
    float found[kGroups];
    float widest = 0;
    for (int g = 0; g < kGroups; ++g) {
      found[g] = fit_scale(x + g * kElems, kElems);
      if (std::fabs(found[g]) > std::fabs(widest)) widest = found[g];
    }
    d = store_scale(widest / kScaleLowest, exponent);
    for (int g = 0; g < kGroups; ++g) {
      s[g] = fit::nearest(found[g], d.value, kScaleLowest, -kScaleLowest - 1);
      const float scale = d.value * static_cast<float>(s[g]);
      for (int e = g * kElems; e < (g + 1) * kElems; ++e) q[e] = choose(x[e], scale);
    }
  }
};

// q = lowest + stored number, the levels of Q3_K and Q6_K.
template <int kScaleLowest>
SignedGroups<16, kScaleLowest> choose_symmetric(const float* x, int exponent, int lowest) {
  return {
      x, exponent, [=](const float* g, int n) { return fit::symmetric(g, n, lowest); },
      [=](float v, float scale) { return fit::nearest(v, scale, lowest, -lowest - 1) - lowest; }};
}

// Two bits of every element: bits 2j, 2j+1 of qs[32h + l].
void pack_two_bits(const int* q, int shift, uint8_t* qs) {
  for (int e = 0; e < kSuper; ++e) {
    const int h = e / 128, j = (e / 32) & 3, l = e & 31;
    put(qs[32 * h + l], ((q[e] >> shift) & 3) << (2 * j));
  }
}

// Six-bit scales and mins of eight groups: see k4_scale and k4_min.
void pack_k4_scales(const int* s, const int* m, uint8_t* scales) {
  for (int g = 0; g < 4; ++g) {
    put(scales[g], s[g]);
    put(scales[g + 4], m[g]);
    put(scales[g + 8], (s[g + 4] & 15) | ((m[g + 4] & 15) << 4));
    put(scales[g], (s[g + 4] >> 4) << 6);
    put(scales[g + 4], (m[g + 4] >> 4) << 6);
  }
}

void pack_k4_nibbles(const int* q, uint8_t* qs) {
  for (int e = 0; e < kSuper; ++e) {
    const int g = e / 32;
    put(qs[32 * (g / 2) + (e & 31)], (q[e] & 15) << (4 * (g & 1)));
  }
}

}  // namespace

void encode_block(const float* x, int exponent, Q2_K& out) {
  const AffineGroups<16, 3, 15> chosen(x, exponent);
  clear(out);
  out.d = chosen.d.bits;
  out.dmin = chosen.dmin.bits;
  for (int g = 0; g < 16; ++g) put(out.scales[g], chosen.s[g] | (chosen.m[g] << 4));
  pack_two_bits(chosen.q, 0, out.qs);
}

void encode_block(const float* x, int exponent, Q3_K& out) {
  const auto chosen = choose_symmetric<-32>(x, exponent, -4);
  clear(out);
  out.d = chosen.d.bits;
  for (int g = 0; g < 16; ++g) {
    const int s = chosen.s[g] + 32;
    put(out.scales[g % 8], (s & 15) << (4 * (g / 8)));
    put(out.scales[8 + g % 4], (s >> 4) << (2 * (g / 4)));
  }
  pack_two_bits(chosen.q, 0, out.qs);
  for (int e = 0; e < kSuper; ++e) put(out.hmask[e & 31], (chosen.q[e] >> 2) << (e / 32));
}

void encode_block(const float* x, int exponent, Q4_K& out) {
  const AffineGroups<8, 15, 63> chosen(x, exponent);
  clear(out);
  out.d = chosen.d.bits;
  out.dmin = chosen.dmin.bits;
  pack_k4_scales(chosen.s, chosen.m, out.scales);
  pack_k4_nibbles(chosen.q, out.qs);
}

void encode_block(const float* x, int exponent, Q5_K& out) {
  const AffineGroups<8, 31, 63> chosen(x, exponent);
  clear(out);
  out.d = chosen.d.bits;
  out.dmin = chosen.dmin.bits;
  pack_k4_scales(chosen.s, chosen.m, out.scales);
  pack_k4_nibbles(chosen.q, out.qs);
  for (int e = 0; e < kSuper; ++e) put(out.qh[e & 31], (chosen.q[e] >> 4) << (e / 32));
}

void encode_block(const float* x, int exponent, Q6_K& out) {
  const auto chosen = choose_symmetric<-128>(x, exponent, -32);
  clear(out);
  out.d = chosen.d.bits;
  for (int g = 0; g < 16; ++g) out.scales[g] = static_cast<int8_t>(chosen.s[g]);
  pack_two_bits(chosen.q, 4, out.qh);
  for (int e = 0; e < kSuper; ++e) {
    const int h = e / 128, j = (e / 32) & 3, l = e & 31;
    put(out.ql[64 * h + 32 * (j & 1) + l], (chosen.q[e] & 15) << (4 * (j >> 1)));
  }
}

void encode_block(const float* x, int exponent, IQ4_XS& out) {
  const SignedGroups<8, -32> chosen(
      x, exponent, [](const float* g, int n) { return fit::iq4_levels(g, n); },
      [](float v, float scale) { return fit::nearest_level(v, scale); });
  clear(out);
  out.d = chosen.d.bits;
  for (int g = 0; g < 8; ++g) {
    const int s = chosen.s[g] + 32;
    put(out.scales_l[g / 2], (s & 15) << (4 * (g & 1)));
    out.scales_h = static_cast<uint16_t>(out.scales_h | ((s >> 4) << (2 * g)));
    for (int l = 0; l < 16; ++l) {
      put(out.qs[16 * g + l], chosen.q[32 * g + l] | (chosen.q[32 * g + l + 16] << 4));
    }
  }
}

}  // namespace mla::block
