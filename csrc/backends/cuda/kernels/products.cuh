// All kernels of one weight format: what instantiations/*.cu give the table of product_kernels.h.
#pragma once

#include "backends/cuda/kernels/exact.cuh"
#include "backends/cuda/kernels/matvec.cuh"
#include "backends/cuda/kernels/small_batch.cuh"

namespace mla::cuda {

template <Format F>
constexpr ProductKernels products_of() {
  ProductKernels kernels;
  add_exact_kernels<F>(kernels);
  if constexpr (F != Format::F32) add_small_batch_kernels<F>(kernels);
  if constexpr (kUnitBlockElems < F >> 1) add_matvec_kernel<F>(kernels);
  return kernels;
}

}  // namespace mla::cuda
