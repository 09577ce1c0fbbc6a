// Descriptions of 16-bit matrices for the copy engine of devices of capability 9.0.
#pragma once

#include <cstdint>

#include "backends/cuda/gemm.h"

#ifndef MLA_CUDA_EMULATE
#include <cuda.h>
#endif

namespace mla::cuda {

// [n_matrices, n_rows, n_columns]; strides in elements, multiples of 8.
struct MatrixLayout {
  const void* data = nullptr;
  int64_t n_matrices = 0, n_rows = 0, n_columns = 0;
  int64_t matrix_stride = 0, row_stride = 0;
};

// What a kernel takes, as `const __grid_constant__ TensorMap`.
#ifdef MLA_CUDA_EMULATE
struct TensorMap {
  MatrixLayout matrix;
  int box_rows = 0;
};
#else
using TensorMap = CUtensorMap;
#endif

// Boxes are box_rows x 64 columns, swizzled by 128 bytes; what lies outside reads as zeros.
// Throws DeviceError where the driver refuses it.
TensorMap tensor_map(const MatrixLayout& layout, Operand operand, int box_rows);

}  // namespace mla::cuda
