#include "backends/cuda/product_kernels.h"

#include "base/error.h"

namespace mla::cuda {

#define MLA_FLOAT(name, gguf, elems, bytes) extern const ProductKernels products_##name;
#define MLA_FORMAT(name, gguf, elems, bytes) extern const ProductKernels products_##name;
#include "quant/formats.def"

const ProductKernels& product_kernels(Format format) {
  switch (format) {
#define MLA_FLOAT(name, gguf, elems, bytes) \
  case Format::name:                        \
    return products_##name;
#define MLA_FORMAT(name, gguf, elems, bytes) \
  case Format::name:                         \
    return products_##name;
#include "quant/formats.def"
    default:
      throw FormatError("a product with weights of a format that none has");
  }
}

}  // namespace mla::cuda
