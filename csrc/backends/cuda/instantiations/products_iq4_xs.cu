#include "backends/cuda/kernels/products.cuh"

namespace mla::cuda {
extern constexpr ProductKernels products_IQ4_XS = products_of<Format::IQ4_XS>();
}
