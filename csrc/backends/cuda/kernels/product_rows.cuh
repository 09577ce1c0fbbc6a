// Which row of x, which matrix and which row of the result belong together: product.h, on the
// device.
#pragma once

#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/kernels/math.cuh"
#include "backends/cuda/product.h"

namespace mla::cuda {

struct GridIndex {
  int i0, i1, i2;
};

__device__ __forceinline__ GridIndex grid_index(const Product& p, int row) {
  const int outer = row / p.extent[2];
  return {outer / p.extent[1], outer % p.extent[1], row % p.extent[2]};
}

// Row `local` of those that meet matrix (m / n_matrices[1], m % n_matrices[1]) of a plain product.
__device__ __forceinline__ int row_of_matrix(const Product& p, int m, int local) {
  const int batch = local / p.extent[2];
  const int i0 = m / p.n_matrices[1] * p.ratio[0] + batch / p.ratio[1];
  const int i1 = m % p.n_matrices[1] * p.ratio[1] + batch % p.ratio[1];
  return (i0 * p.extent[1] + i1) * p.extent[2] + local % p.extent[2];
}

__device__ __forceinline__ const std::byte* x_row(const Product& p, int row) {
  const GridIndex i = grid_index(p, row);
  return p.x + i.i0 * p.x_stride[0] + i.i1 * p.x_stride[1] + i.i2 * p.x_stride[2];
}

// The expert of a routed row, -1 for an id that is none.
__device__ __forceinline__ int expert_of(const Product& p, int row) {
  const GridIndex i = grid_index(p, row);
  const int id =
      *reinterpret_cast<const int*>(p.ids + i.i1 * p.id_stride[0] + i.i2 * p.id_stride[1]);
  return id >= 0 && id < p.n_experts ? id : -1;
}

__device__ __forceinline__ float weight_of(const Product& p, int row) {
  const GridIndex i = grid_index(p, row);
  return *reinterpret_cast<const float*>(p.weights + i.i1 * p.weight_stride[0] +
                                         i.i2 * p.weight_stride[1]);
}

__device__ __forceinline__ const std::byte* matrix_of(const Product& p, const Weight& w, int m) {
  return w.data + m / p.n_matrices[1] * w.matrix_stride[0] +
         m % p.n_matrices[1] * w.matrix_stride[1];
}
__device__ __forceinline__ const std::byte* expert_matrix(const Weight& w, int expert) {
  return w.data + max(expert, 0) * w.matrix_stride[1];
}

// The residual of column n of the result row that grid row `row` belongs to; 0 without one.
__device__ __forceinline__ float residual_of(const Product& p, int row, int n) {
  if (!p.has_residual) return 0.0f;
  const GridIndex i = grid_index(p, row);
  return *reinterpret_cast<const float*>(p.residual + i.i0 * p.residual_stride[0] +
                                         i.i1 * p.residual_stride[1] + i.i2 * p.residual_stride[2] +
                                         n * p.residual_step);
}

__device__ __forceinline__ void finish_product(const Product& p, Finish finish, int row, int n,
                                               float value) {
  const int result = p.summed ? row / p.extent[2] : row;
  float* out = p.out + static_cast<int64_t>(result) * p.n + n;
  *out = finish == Finish::store ? value + residual_of(p, row, n) : silu_exact(*out) * value;
}

}  // namespace mla::cuda
