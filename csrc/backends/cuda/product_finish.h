// What products need once they are whole, where their kernels do not do it themselves.
#pragma once

#include "backends/cuda/product.h"

namespace mla::cuda {

// out[t][n] = sum over a of weights[t][a] * products[t * A + a][n], + residual.
void sum_slots(const CudaRun& run, const Product& product, const float* products);

// out = residual, for products that are added to what is there.
void copy_residual(const CudaRun& run, const Product& product);

// out = silu(out) * up over all result rows.
void multiply_gate(const CudaRun& run, const Product& product, const float* up);

}  // namespace mla::cuda
