// Encoders of single blocks: small ones in encode_small.cpp, super-blocks in encode_super.cpp.
#pragma once

#include <cmath>

#include "base/error.h"
#include "base/half.h"
#include "quant/blocks.h"

namespace mla::block {

// x [elems of the block], scaled by 2^-exponent so that no magnitude exceeds 1: squares neither
// overflow nor vanish, whatever the weights' magnitude.
void encode_block(const float* x, int exponent, Q4_0& out);
void encode_block(const float* x, int exponent, Q4_1& out);
void encode_block(const float* x, int exponent, Q5_0& out);
void encode_block(const float* x, int exponent, Q5_1& out);
void encode_block(const float* x, int exponent, Q8_0& out);
void encode_block(const float* x, int exponent, IQ4_NL& out);
void encode_block(const float* x, int exponent, Q2_K& out);
void encode_block(const float* x, int exponent, Q3_K& out);
void encode_block(const float* x, int exponent, Q4_K& out);
void encode_block(const float* x, int exponent, Q5_K& out);
void encode_block(const float* x, int exponent, Q6_K& out);
void encode_block(const float* x, int exponent, IQ4_XS& out);

// A scale as the block stores it. Levels are chosen under `value`, the rounded scale brought back
// to the range of x, so that its rounding costs as little as can be.
struct StoredScale {
  half bits;
  float value;
};
inline StoredScale store_scale(float scale, int exponent) {
  const half bits = float_to_half(std::ldexp(scale, exponent));
  MLA_CHECK(FormatError, (bits & 0x7c00) != 0x7c00,
            "quantize: the scale of a block exceeds binary16: ", std::ldexp(scale, exponent));
  return {bits, std::ldexp(half_to_float(bits), -exponent)};
}

}  // namespace mla::block
