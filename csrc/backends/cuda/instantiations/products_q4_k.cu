#include "backends/cuda/kernels/products.cuh"

namespace mla::cuda {
extern constexpr ProductKernels products_Q4_K = products_of<Format::Q4_K>();
}
