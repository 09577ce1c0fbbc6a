#include "quant/decode.h"

#include <cstring>

#include "base/error.h"
#include "base/half.h"
#include "quant/decode.inc.h"

namespace mla {
namespace {

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
void load_halves(const std::byte* in, int64_t n, float* out, Convert convert) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, in + 2 * i, 2);
    out[i] = convert(bits);
  }
}

}  // namespace

void decode(Format format, const std::byte* in, int64_t n, float* out) {
  row_bytes(format, n);  // checks n
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
  throw FormatError(concat("dequantize: ", format_name(format), " is no format of weights"));
}

}  // namespace mla
