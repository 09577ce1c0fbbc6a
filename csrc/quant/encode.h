// Reference encoders and decoders on the host, for every format a weight can have.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/format.h"

namespace mla {

// x [n] -> row_bytes(format, n) bytes at out, nearest levels under scales found by least squares.
// n must be a multiple of the block (ShapeError). Throws FormatError for I32 and, where the format
// is quantized, for numbers that are not finite or whose scale exceeds binary16.
void encode(Format format, const float* x, int64_t n, std::byte* out);

// The numbers that n encoded elements stand for, to the bit what decode.inc.h says.
void decode(Format format, const std::byte* in, int64_t n, float* out);

}  // namespace mla
