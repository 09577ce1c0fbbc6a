// Rows of numbers <-> rows of weights as files hold them, by the kernels of one ISA.
#pragma once

#include <vector>

#include "backends/cpu/kernels.h"

namespace mla::cpu {

// Encodes run.n elements, or throws. n must be a multiple of the block (ShapeError). FormatError
// for I32 and, where the format is quantized, for numbers that are not finite or whose scale
// exceeds binary16. Plain formats round to nearest even and take any number.
void encode(const KernelTable& kernels, Format format, const EncodeRun& run);

// row_bytes(format, n) bytes -> out [n]: equal to mla::decode, but for the sign of zeros. Throws as
// encode does.
void decode(const KernelTable& kernels, Format format, const std::byte* in, int64_t n, float* out);

// Importance as encoders take it: its mean is 1, and columns that never mattered keep a little, so
// that their numbers stay near theirs. All zeros count as no importance: empty. Throws FormatError
// for negative numbers and those that are not finite.
std::vector<float> normalized_importance(const float* importance, int64_t k);

}  // namespace mla::cpu
