#include "backends/cuda/kernels/products.cuh"

namespace mla::cuda {
extern constexpr ProductKernels products_Q2_K = products_of<Format::Q2_K>();
}
