#include "backends/cuda/kernels/products.cuh"

namespace mla::cuda {
extern constexpr ProductKernels products_Q8_0 = products_of<Format::Q8_0>();
}
