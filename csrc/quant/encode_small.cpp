// Blocks of 32 elements.
#include <algorithm>
#include <cstring>

#include "quant/encode_blocks.h"
#include "quant/encode_fit.h"

namespace mla::block {
namespace {

constexpr int kHalf = kSmall / 2;

// Element l in the low nibble of qs[l], element l + 16 in the high one.
void pack_nibbles(const int* q, uint8_t* qs) {
  for (int l = 0; l < kHalf; ++l) {
    qs[l] = static_cast<uint8_t>((q[l] & 15) | ((q[l + kHalf] & 15) << 4));
  }
}

// Bit 4 of element e is bit e of qh.
void pack_fifth_bits(const int* q, uint8_t* qh) {
  std::memset(qh, 0, kSmall / 8);
  for (int e = 0; e < kSmall; ++e) {
    qh[e / 8] = static_cast<uint8_t>(qh[e / 8] | (((q[e] >> 4) & 1) << (e % 8)));
  }
}

half choose_symmetric(const float* x, int exponent, int lowest, int* q) {
  const StoredScale d = store_scale(fit::symmetric(x, kSmall, lowest), exponent);
  for (int e = 0; e < kSmall; ++e) {
    q[e] = fit::nearest(x[e], d.value, lowest, -lowest - 1) - lowest;
  }
  return d.bits;
}

struct StoredAffine {
  half d, m;
};
StoredAffine choose_affine(const float* x, int exponent, int highest, int* q) {
  const fit::Affine found = fit::affine(x, kSmall, highest, false);
  const StoredScale d = store_scale(found.scale, exponent);
  const StoredScale m = store_scale(found.min, exponent);
  for (int e = 0; e < kSmall; ++e) q[e] = fit::nearest(x[e] - m.value, d.value, 0, highest);
  return {d.bits, m.bits};
}

}  // namespace

void encode_block(const float* x, int exponent, Q4_0& out) {
  int q[kSmall];
  out.d = choose_symmetric(x, exponent, -8, q);
  pack_nibbles(q, out.qs);
}

void encode_block(const float* x, int exponent, Q5_0& out) {
  int q[kSmall];
  out.d = choose_symmetric(x, exponent, -16, q);
  pack_nibbles(q, out.qs);
  pack_fifth_bits(q, out.qh);
}

void encode_block(const float* x, int exponent, Q4_1& out) {
  int q[kSmall];
  const StoredAffine stored = choose_affine(x, exponent, 15, q);
  out.d = stored.d;
  out.m = stored.m;
  pack_nibbles(q, out.qs);
}

void encode_block(const float* x, int exponent, Q5_1& out) {
  int q[kSmall];
  const StoredAffine stored = choose_affine(x, exponent, 31, q);
  out.d = stored.d;
  out.m = stored.m;
  pack_nibbles(q, out.qs);
  pack_fifth_bits(q, out.qh);
}

// At 8 bits a search gains nothing that could be measured; -128 stays unused, as kernels expect.
void encode_block(const float* x, int exponent, Q8_0& out) {
  float widest = 0;
  for (int e = 0; e < kSmall; ++e) widest = std::max(widest, std::fabs(x[e]));
  const StoredScale d = store_scale(widest / 127, exponent);
  out.d = d.bits;
  for (int e = 0; e < kSmall; ++e) {
    out.qs[e] = static_cast<int8_t>(fit::nearest(x[e], d.value, -127, 127));
  }
}

void encode_block(const float* x, int exponent, IQ4_NL& out) {
  const StoredScale d = store_scale(fit::iq4_levels(x, kSmall), exponent);
  out.d = d.bits;
  int q[kSmall];
  for (int e = 0; e < kSmall; ++e) q[e] = fit::nearest_level(x[e], d.value);
  pack_nibbles(q, out.qs);
}

}  // namespace mla::block
