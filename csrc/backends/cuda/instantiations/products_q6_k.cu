#include "backends/cuda/kernels/products.cuh"

namespace mla::cuda {
extern constexpr ProductKernels products_Q6_K = products_of<Format::Q6_K>();
}
