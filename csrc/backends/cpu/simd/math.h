// Transcendental functions on F32, the same code for every ISA.
#pragma once

namespace mla::cpu::MLA_ISA {
namespace {

// exp(x), within 2 ulp; 0 below -87.3, saturates at exp(88.3). 2^n from the exponent bits,
// e^r on |r| <= ln2/2 by the Taylor polynomial of degree 7 (next term < 2^-26 of the result).
inline F32 exp(F32 x) {
  const F32 high = set1(88.3762626f);
  const F32 low = set1(-87.3365447f);
  const I32 underflow = x < low;
  x = x > high ? high : x;
  x = x < low ? low : x;
  const F32 magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F32 shifted = x * set1(1.44269504f) + magic;
  const F32 n = shifted - magic;
  F32 r = x - n * set1(0.693359375f);  // ln 2 in two parts, the first exact in n * part
  r = r - n * set1(-2.12194440e-4f);
  F32 p = set1(1.0f / 5040.0f);
  p = p * r + set1(1.0f / 720.0f);
  p = p * r + set1(1.0f / 120.0f);
  p = p * r + set1(1.0f / 24.0f);
  p = p * r + set1(1.0f / 6.0f);
  p = p * r + set1(0.5f);
  p = p * r + set1(1.0f);
  p = p * r + set1(1.0f);
  const I32 power = (std::bit_cast<I32>(shifted) - std::bit_cast<I32>(magic) + 127) << 23;
  const F32 result = p * std::bit_cast<F32>(power);
  return underflow ? zero() : result;
}

inline F32 silu(F32 x) { return x / (set1(1.0f) + exp(zero() - x)); }
inline F32 sigmoid(F32 x) { return set1(1.0f) / (set1(1.0f) + exp(zero() - x)); }

}  // namespace
}  // namespace mla::cpu::MLA_ISA
