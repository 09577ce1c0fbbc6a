// Copies within device memory.
#pragma once

#include "backends/cuda/cuda_op.h"

namespace mla::cuda {

// out = x, same shape, any strides: between float formats, or any format (as it lies in files, not
// packed) to the same one.
void copy_strided(const CudaRun& run, const View& out, const View& x);

}  // namespace mla::cuda
