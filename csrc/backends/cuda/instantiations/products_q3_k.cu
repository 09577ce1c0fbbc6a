#include "backends/cuda/kernels/products.cuh"

namespace mla::cuda {
extern constexpr ProductKernels products_Q3_K = products_of<Format::Q3_K>();
}
