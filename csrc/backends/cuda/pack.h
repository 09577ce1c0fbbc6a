// From the blocks of a file to the planes of packed.h.
#pragma once

#include "backends/cuda/cuda_op.h"

namespace mla::cuda {

// raw: n_rows rows of n_elems elements of a quantized format in device memory, one after the other,
// at any even address. packed: as many rows, packed_row_bytes(format, n_elems) apart, at a multiple
// of 16; it may not overlap raw. Padding becomes zeros.
void pack_rows(const CudaRun& run, Format format, const std::byte* raw, int64_t n_rows,
               int64_t n_elems, std::byte* packed);

}  // namespace mla::cuda
