#include "backends/cuda/kernels/products.cuh"

namespace mla::cuda {
extern constexpr ProductKernels products_BF16 = products_of<Format::BF16>();
}
