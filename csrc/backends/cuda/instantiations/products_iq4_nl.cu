#include "backends/cuda/kernels/products.cuh"

namespace mla::cuda {
extern constexpr ProductKernels products_IQ4_NL = products_of<Format::IQ4_NL>();
}
