// A matrix product as this device's kernels take it: the three operations that multiply by weights
// are cases of one.
//
// Result rows form a grid [E0, E1, E2]; row (i0, i1, i2) is made of the row of x at
// x + i0 * x_stride[0] + i1 * x_stride[1] + i2 * x_stride[2] and of one matrix [N, K]:
//
//   plain    the grid is x's; matrix (i0 / ratio[0], i1 / ratio[1])
//   routed   the grid is [1, T, A]; matrix ids[i1][i2]
//   summed   routed, and row i1 of the result is the sum over i2 of weights[i1][i2] * row
//   swiglu   two matrices, silu(the first's row) * the second's
#pragma once

#include "backends/cuda/cuda_op.h"

namespace mla::cuda {

// Matrices [N, K] with strides in bytes; quantized rows are packed as packed.h says.
struct Weight {
  const std::byte* data = nullptr;
  Format format = Format::F32;
  int64_t matrix_stride[2] = {0, 0};
  int64_t row_stride = 0;
  int64_t step = 0;         // between neighbours along K; plain formats
  bool transposed = false;  // quantized rows that run along N: contracted across them
};

// x is taken by its RMS norm along k: x / sqrt(mean(x^2) + eps) * weight.
struct Norm {
  bool used = false;
  float eps = 0.0f;
  const std::byte* weight = nullptr;  // float32, constant; null: ones
  int64_t weight_stride = 0;
};

struct Product {
  int extent[3] = {1, 1, 1};
  const std::byte* x = nullptr;
  Format x_format = Format::F32;
  int64_t x_stride[3] = {0, 0, 0};
  int64_t x_step = 0;
  Norm norm;  // of a single row of x alone

  Weight w, up;  // up: swiglu alone
  bool swiglu = false;
  int n = 0, k = 0;
  int n_matrices[2] = {1, 1};
  int ratio[2] = {1, 1};

  bool routed = false;
  const std::byte* ids = nullptr;  // [E1, E2]
  int64_t id_stride[2] = {0, 0};
  int n_experts = 0;

  bool summed = false;
  int n_slots = 1;                     // A, where summed; may be 0
  const std::byte* weights = nullptr;  // [E1, E2]
  int64_t weight_stride[2] = {0, 0};

  bool has_residual = false;
  const std::byte* residual = nullptr;  // of the result's shape
  int64_t residual_stride[3] = {0, 0, 0};
  int64_t residual_step = 0;

  float* out = nullptr;  // [rows, N]

  constexpr int64_t n_rows() const { return int64_t{extent[0]} * extent[1] * extent[2]; }
  constexpr int64_t n_results() const { return summed ? extent[1] : n_rows(); }
  // Result rows that meet the same matrix, where that is known beforehand.
  constexpr int64_t rows_per_matrix() const { return int64_t{ratio[0]} * ratio[1] * extent[2]; }
  // Rows of x, numbered as the grid; fewer than results where the slots of a token share one.
  constexpr bool slots_share_x() const { return routed && x_stride[2] == 0; }
};

// What becomes of a product once it is whole.
enum class Finish : uint8_t {
  store,     // out = product + residual
  multiply,  // out = silu(out) * product: the second half of a swiglu
};

// ---- for ops/*.cu -------------------------------------------------------------------------------

Product matmul_product(const Step& step);
Product matmul_indexed_product(const Step& step);
Product swiglu_matmul_product(const Step& step);
// Of any of the three.
Product product_of(const Step& step);
Precision product_precision(const Step& step);
// x as it is before `norm`, of which it has been the result.
void take_norm(Product& product, const Step& norm);
// Whether the kernels of a step do that, with a norm of this row.
bool product_takes_norm(const Step& step, const Step& norm, const DeviceInfo& device);
// Whether a step is one kernel that can wait last (Overlap), and takes no scratch.
bool product_waits_last(const Step& step, const DeviceInfo& device);
Step step_without_memory(const Node& node);  // for what depends on shapes alone

std::string_view weight_refusal(const Node* w);
size_t product_scratch_bytes(const Product& product, Precision precision, const DeviceInfo& device);
void run_product(const CudaRun& run, const Product& product, Precision precision);
void run_product(const Step& step, const CudaRun& run);

}  // namespace mla::cuda
