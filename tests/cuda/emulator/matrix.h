// The matrix units' fragments.
#pragma once

#include <cstdint>

namespace mla::emulator {

// Fragments as kernels/intrinsics.cuh draws them.
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16);

// `count` (2 or 4) matrices of 8 x 8 elements of 2 bytes.
void load_matrices(uint32_t* r, const void* row, int count, bool transposed);

}  // namespace mla::emulator
