#include "backends/cuda/gemm_wgmma.h"

#include "backends/cuda/kernels/gemm_wgmma.cuh"
#include "backends/cuda/tensor_map.h"
#include "base/error.h"

#ifndef MLA_CUDA_EMULATE
#include <cuda_runtime_api.h>
#endif

namespace mla::cuda {
namespace {

template <class Element, int TileM, int TileN, bool Gathered>
void launch_kernel_of(const CudaRun& run, Operand operand, const GemmPlan& plan,
                      const GemmParams& p) {
  using Shape = WgmmaShape<TileM, TileN>;
  const bool grouped = p.offsets != nullptr;
  const int64_t matrices_b = grouped ? p.n_experts : (p.batch_b == 0 ? 1 : p.n_batch);
  const int64_t matrices_a = grouped || p.batch_a == 0 ? 1 : p.n_batch;
  const MatrixLayout b = {p.b, matrices_b, p.n, p.k, p.batch_b, p.ldb};
  const MatrixLayout up = {p.b_up, matrices_b, p.n, p.k, p.batch_b, p.ldb};
  const MatrixLayout a = {p.a, matrices_a, p.m, p.k, p.batch_a, p.lda};
  const TensorMap map_b = tensor_map(b, operand, Shape::kBoxRows);
  const TensorMap map_up = p.b_up != nullptr ? tensor_map(up, operand, Shape::kBoxRows) : map_b;
  const TensorMap map_a = Gathered ? map_b : tensor_map(a, operand, TileM);
  launch(run, gemm_wgmma<Element, TileM, TileN, Gathered>, dim3(static_cast<unsigned>(plan.grid)),
         dim3(kWgmmaThreads), Shape::kSmemBytes, p, map_a, map_b, map_up);
}

template <class Element, bool Gathered>
void launch_shape(const CudaRun& run, Operand operand, const GemmPlan& plan, const GemmParams& p) {
  if (plan.tile_m == 64) {
    return launch_kernel_of<Element, 64, 256, Gathered>(run, operand, plan, p);
  }
  if (plan.tile_n == 256) {
    return launch_kernel_of<Element, 128, 256, Gathered>(run, operand, plan, p);
  }
  launch_kernel_of<Element, 128, 128, Gathered>(run, operand, plan, p);
}

}  // namespace

bool has_wgmma(const DeviceInfo& device) {
  if (device.capability() != 90) return false;
#ifndef MLA_CUDA_EMULATE
  // Code made from the portable intermediate form of an older capability lacks these kernels.
  cudaFuncAttributes attributes;
  const auto* kernel = reinterpret_cast<const void*>(gemm_wgmma<__half, 128, 256, false>);
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  return attributes.ptxVersion == 90 && attributes.binaryVersion == 90;
#else
  return true;
#endif
}

void launch_wgmma(const CudaRun& run, Operand operand, const GemmPlan& plan, const GemmParams& p) {
  const bool gathered = p.offsets != nullptr && p.pairs_per_row != 0;
  if (operand == Operand::f16) {
    return gathered ? launch_shape<__half, true>(run, operand, plan, p)
                    : launch_shape<__half, false>(run, operand, plan, p);
  }
  MLA_CHECK(DeviceError, !gathered, "gemm: no plan gathers bf16 rows into warpgroups");
  launch_shape<__nv_bfloat16, false>(run, operand, plan, p);
}

}  // namespace mla::cuda
