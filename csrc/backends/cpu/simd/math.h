// Transcendental functions on F32, the same code for every ISA.
#pragma once

namespace mla::cpu::MLA_ISA {
namespace {

// exp(x), within 2 ulp over the whole range of float: gradual underflow to 0 below -103.97, inf
// above 88.72, NaN stays NaN. x = n ln2 + r; e^r on |r| <= ln2/2 by the Taylor polynomial of
// degree 7 (its first missing term is below 2^-27 of the result); 2^n is applied as two factors,
// because the exponent bits alone reach neither the subnormals nor 2^128.
inline F32 exp(F32 x) {
  const F32 high = set1(89.0f);
  const F32 low = set1(-105.0f);
  x = x > high ? high : x;
  x = x < low ? low : x;
  const F32 magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F32 shifted = x * set1(1.44269504f) + magic;
  const F32 n = shifted - magic;
  F32 r = x - n * set1(0.693359375f);  // ln 2 in two parts, n times the first is exact
  r = r - n * set1(-2.12194440e-4f);
  F32 p = set1(1.0f / 5040.0f);
  p = p * r + set1(1.0f / 720.0f);
  p = p * r + set1(1.0f / 120.0f);
  p = p * r + set1(1.0f / 24.0f);
  p = p * r + set1(1.0f / 6.0f);
  p = p * r + set1(0.5f);
  p = p * r + set1(1.0f);
  p = p * r + set1(1.0f);
  const I32 power = std::bit_cast<I32>(shifted) - std::bit_cast<I32>(magic);
  const I32 half = power >> 1;
  const F32 first = std::bit_cast<F32>((half + 127) << 23);
  const F32 second = std::bit_cast<F32>((power - half + 127) << 23);
  return p * first * second;
}

// 1 / (1 + e^-x) from e^-|x|, which never overflows: a few ulp for either sign.
inline F32 sigmoid(F32 x) {
  const F32 e = exp(x < zero() ? x : zero() - x);
  return (x < zero() ? e : set1(1.0f)) / (set1(1.0f) + e);
}
inline F32 silu(F32 x) { return x * sigmoid(x); }

}  // namespace
}  // namespace mla::cpu::MLA_ISA
