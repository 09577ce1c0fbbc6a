#include "backends/cuda/kernels/products.cuh"

namespace mla::cuda {
extern constexpr ProductKernels products_Q4_1 = products_of<Format::Q4_1>();
}
