#include "backends/cuda/kernels/products.cuh"

namespace mla::cuda {
extern constexpr ProductKernels products_Q5_K = products_of<Format::Q5_K>();
}
