#include "backends/cuda/tensor_map.h"

#ifdef MLA_CUDA_EMULATE

mla::cuda::TensorMap mla::cuda::tensor_map(const MatrixLayout& layout, Operand, int box_rows) {
  return {layout, box_rows};
}

#else
#include <cuda_runtime_api.h>

#include "base/error.h"

namespace mla::cuda {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// The driver's function, found at run time: this module is not linked with the driver.
Encode encoder() {
  constexpr unsigned kSince = 12000;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             kSince, cudaEnableDefault, &found);
  MLA_CHECK(DeviceError, error == cudaSuccess && found == cudaDriverEntryPointSuccess,
            "CUDA: the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<Encode>(function);
}

}  // namespace

TensorMap tensor_map(const MatrixLayout& m, Operand operand, int box_rows) {
  constexpr cuuint32_t kBoxColumns = 64;  // 128 bytes, the swizzle's width
  constexpr int kElementBytes = 2;
  static const Encode encode = encoder();
  const cuuint64_t extent[3] = {static_cast<cuuint64_t>(m.n_columns),
                                static_cast<cuuint64_t>(m.n_rows),
                                static_cast<cuuint64_t>(m.n_matrices)};
  // A stride that is never used must still be a valid one.
  const int64_t between = m.n_matrices > 1 ? m.matrix_stride : m.row_stride;
  const cuuint64_t stride[2] = {static_cast<cuuint64_t>(m.row_stride * kElementBytes),
                                static_cast<cuuint64_t>(between * kElementBytes)};
  const cuuint32_t box[3] = {kBoxColumns, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t every[3] = {1, 1, 1};
  TensorMap map;
  const CUresult result = encode(
      &map,
      operand == Operand::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      3, const_cast<void*>(m.data), extent, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  MLA_CHECK(DeviceError, result == CUDA_SUCCESS, "CUDA: no tensor map (error ",
            static_cast<int>(result), ") of [", m.n_matrices, ", ", m.n_rows, ", ", m.n_columns,
            "], strides ", m.matrix_stride, " and ", m.row_stride);
  return map;
}

}  // namespace mla::cuda
#endif
