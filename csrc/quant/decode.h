// The numbers that weights stand for, on the host: the reference for every faster decoder.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/format.h"

namespace mla {

// row_bytes(format, n) bytes -> out [n], to the bit what decode.inc.h says. n must be a multiple of
// the block (ShapeError). Throws FormatError for I32.
void decode(Format format, const std::byte* in, int64_t n, float* out);

}  // namespace mla
