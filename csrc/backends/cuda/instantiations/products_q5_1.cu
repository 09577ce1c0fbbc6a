#include "backends/cuda/kernels/products.cuh"

namespace mla::cuda {
extern constexpr ProductKernels products_Q5_1 = products_of<Format::Q5_1>();
}
