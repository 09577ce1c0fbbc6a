// Products of 16-bit matrices on tensor cores, accumulated in float32.
//
//   dense    c[m][n] = row_scale[m] * sum_k a[m][k] b[n][k] + residual[m][n]
//   grouped  the same for every routed pair of token and expert, b chosen by the expert
//   fused    with b_up: c[m][n] = silu(row_scale[m] * (a b^T)[m][n]) * (row_scale[m] * (a
//   b_up^T)[m][n])
//
// Rows of a, b and b_up are contiguous along k and begin at multiples of 16 bytes (so lda, ldb and
// the batch strides are multiples of 8 elements); columns from k on to the next multiple of 8 must
// exist and be zero in a or b, finite in the other. The products are summed in an order that
// depends on the shapes alone: equal calls give equal bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backends/cuda/cuda_op.h"

namespace mla::cuda {

// The 16-bit type of a and b. f16: quantized and F16 weights; bf16: BF16 and F32 weights.
enum class Operand : uint8_t { f16, bf16 };

// Of c, and of nothing else: a and b are as Operand says.
enum class Result : uint8_t { f32, f16 };

// All strides in elements.
struct Gemm {
  Operand operand = Operand::f16;
  Result result = Result::f32;
  int m = 0, n = 0, k = 0;
  const void* a = nullptr;     // [batch, m, k]
  const void* b = nullptr;     // [batch, n, k]
  const void* b_up = nullptr;  // [batch, n, k], laid out as b; null: not fused
  void* c = nullptr;           // [batch, m, n]
  int64_t lda = 0, ldb = 0, ldc = 0;
  const float* row_scale = nullptr;  // [batch, m]; null: ones
  const float* residual = nullptr;   // [batch, m, n]; null: none. May be c itself. Not when fused
  int64_t ld_residual = 0;
  const int* m_limit = nullptr;  // on the device: rows from *m_limit on are not written; null: all
  int n_batch = 1;               // a stride of 0 shares the operand
  int64_t batch_a = 0, batch_b = 0, batch_c = 0, batch_scale = 0, batch_residual = 0;
  // Room for partial sums, gemm_scratch_bytes() of it. With less, narrow products leave
  // multiprocessors idle, and that is all.
  std::byte* scratch = nullptr;
  size_t scratch_bytes = 0;
};

size_t gemm_scratch_bytes(const Gemm& gemm, const DeviceInfo& device);
void gemm(const CudaRun& run, const Gemm& gemm);

// Rows ordered by expert, as expert_sort() leaves them: positions offsets[e] .. offsets[e + 1] of
// the order belong to expert e. One call serves the experts [first_expert, first_expert +
// n_experts), whose matrices lie in b; counts are read on the device alone.
inline constexpr int kMaxGroupedExperts = 512;

struct GroupedGemm {
  Operand operand = Operand::f16;
  Result result = Result::f32;
  int n_rows = 0;  // T * A: positions in the order
  int n = 0, k = 0;
  int first_expert = 0, n_experts = 0;
  int n_model_experts = 0;            // all experts
  const int* offsets = nullptr;       // [n_model_experts + 1]
  const int* sorted_pairs = nullptr;  // [n_rows]: the pair p = t * A + a at each position
  // Position i reads row sorted_pairs[i] / pairs_per_row of a: A where a holds one row per token,
  // 1 where it holds one per pair. 0: row i, that is, a is in the order itself.
  const void* a = nullptr;
  int64_t lda = 0;
  int pairs_per_row = 0;
  const float* row_scale = nullptr;  // one per row of a; null: ones
  const void* b = nullptr;           // [n_experts, n, k], its first matrix that of first_expert
  const void* b_up = nullptr;        // the same; null: not fused
  int64_t ldb = 0, expert_stride = 0;
  // Position i writes row i of c, or row sorted_pairs[i] where `scatter`.
  void* c = nullptr;
  int64_t ldc = 0;
  bool scatter = false;
};

void grouped_gemm(const CudaRun& run, const GroupedGemm& gemm);

}  // namespace mla::cuda
