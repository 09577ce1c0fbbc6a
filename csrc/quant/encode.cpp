#include "quant/encode.h"

#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/half.h"
#include "quant/decode.inc.h"
#include "quant/encode_blocks.h"

namespace mla {
namespace {

// x * 2^-exponent, no magnitude above 1.
int normalize(const float* x, int64_t n, int64_t first, float* scaled) {
  float widest = 0;
  for (int64_t i = 0; i < n; ++i) {
    MLA_CHECK(FormatError, std::isfinite(x[i]), "quantize: element ", first + i, " is ", x[i],
              "; blocks hold finite numbers only");
    widest = std::fmax(widest, std::fabs(x[i]));
  }
  int exponent = 0;
  std::frexp(widest, &exponent);
  for (int64_t i = 0; i < n; ++i) scaled[i] = std::ldexp(x[i], -exponent);
  return exponent;
}

template <class Block>
void encode_blocks(Format format, const float* x, int64_t n, std::byte* out) {
  const int64_t elems = traits(format).block_elems;
  float scaled[block::kSuper];
  for (int64_t first = 0; first < n; first += elems, out += sizeof(Block)) {
    const int exponent = normalize(x + first, elems, first, scaled);
    Block encoded;
    block::encode_block(scaled, exponent, encoded);
    std::memcpy(out, &encoded, sizeof(encoded));
  }
}

template <class Block>
void decode_blocks(Format format, const std::byte* in, int64_t n, float* out) {
  const int64_t elems = traits(format).block_elems;
  for (int64_t first = 0; first < n; first += elems, in += sizeof(Block)) {
    Block encoded;
    std::memcpy(&encoded, in, sizeof(encoded));
    block::decode_block(encoded, out + first);
  }
}

template <class Convert>
void store_halves(const float* x, int64_t n, std::byte* out, Convert convert) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t bits = convert(x[i]);
    std::memcpy(out + 2 * i, &bits, 2);
  }
}

template <class Convert>
void load_halves(const std::byte* in, int64_t n, float* out, Convert convert) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, in + 2 * i, 2);
    out[i] = convert(bits);
  }
}

[[noreturn]] void refuse(Format format) {
  throw FormatError(concat("quantize: ", format_name(format), " is no format of weights"));
}

}  // namespace

void encode(Format format, const float* x, int64_t n, std::byte* out) {
  row_bytes(format, n);  // checks n
  switch (format) {
    case Format::F32:
      std::memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
      return;
    case Format::F16:
      return store_halves(x, n, out, float_to_half);
    case Format::BF16:
      return store_halves(x, n, out, float_to_bf16);
#define MLA_FORMAT(name, gguf, elems, bytes) \
  case Format::name:                         \
    return encode_blocks<block::name>(format, x, n, out);
#include "quant/formats.def"
    case Format::I32:
      break;
  }
  refuse(format);
}

void decode(Format format, const std::byte* in, int64_t n, float* out) {
  row_bytes(format, n);
  switch (format) {
    case Format::F32:
      std::memcpy(out, in, static_cast<size_t>(n) * sizeof(float));
      return;
    case Format::F16:
      return load_halves(in, n, out, half_to_float);
    case Format::BF16:
      return load_halves(in, n, out, bf16_to_float);
#define MLA_FORMAT(name, gguf, elems, bytes) \
  case Format::name:                         \
    return decode_blocks<block::name>(format, in, n, out);
#include "quant/formats.def"
    case Format::I32:
      break;
  }
  refuse(format);
}

}  // namespace mla
