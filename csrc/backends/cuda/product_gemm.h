// Products of many rows: operands as rows of 16-bit numbers in scratch memory, then gemm.h.
#pragma once

#include "backends/cuda/product.h"

namespace mla::cuda {

bool product_gemm_fits(const Product& product);
size_t product_gemm_scratch_bytes(const Product& product, const DeviceInfo& device);
void run_product_gemm(const CudaRun& run, const Product& product);

}  // namespace mla::cuda
