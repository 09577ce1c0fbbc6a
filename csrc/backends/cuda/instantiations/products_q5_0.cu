#include "backends/cuda/kernels/products.cuh"

namespace mla::cuda {
extern constexpr ProductKernels products_Q5_0 = products_of<Format::Q5_0>();
}
