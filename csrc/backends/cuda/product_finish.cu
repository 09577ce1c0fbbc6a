// Sums over the slots of a token, gates and residuals: one result element a thread, in float32.
#include "backends/cuda/kernels/product_rows.cuh"
#include "backends/cuda/product_finish.h"

namespace mla::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    sum_slots_kernel(Product p, const float* products, int64_t n_elems) {
  pdl_wait();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n_elems) return;
  const int n = static_cast<int>(i % p.n), token = static_cast<int>(i / p.n);
  float sum = 0.0f;
  for (int slot = 0; slot < p.n_slots; ++slot) {
    const int row = token * p.extent[2] + slot;
    sum = fmaf(weight_of(p, row), products[int64_t{row} * p.n + n], sum);
  }
  finish_product(p, Finish::store, token * p.extent[2], n, sum);
}

__global__ void __launch_bounds__(kThreads) copy_residual_kernel(Product p, int64_t n_elems) {
  pdl_wait();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n_elems) return;
  finish_product(p, Finish::store, static_cast<int>(i / p.n), static_cast<int>(i % p.n), 0.0f);
}

__global__ void __launch_bounds__(kThreads)
    multiply_gate_kernel(float* out, const float* up, int64_t n_elems) {
  pdl_wait();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n_elems) out[i] = silu_exact(out[i]) * up[i];
}

dim3 blocks_for(int64_t n_elems) {
  return dim3(static_cast<unsigned>((n_elems + kThreads - 1) / kThreads));
}

}  // namespace

void sum_slots(const CudaRun& run, const Product& p, const float* products) {
  const int64_t n = p.n_results() * p.n;
  launch(run, sum_slots_kernel, blocks_for(n), dim3(kThreads), 0, p, products, n);
}

void copy_residual(const CudaRun& run, const Product& p) {
  const int64_t n = p.n_results() * p.n;
  launch(run, copy_residual_kernel, blocks_for(n), dim3(kThreads), 0, p, n);
}

void multiply_gate(const CudaRun& run, const Product& p, const float* up) {
  const int64_t n = p.n_results() * p.n;
  launch(run, multiply_gate_kernel, blocks_for(n), dim3(kThreads), 0, p.out, up, n);
}

}  // namespace mla::cuda
