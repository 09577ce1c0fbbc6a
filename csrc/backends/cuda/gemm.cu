#include "backends/cuda/gemm.h"

#include <algorithm>
#include <bit>

#include "backends/cuda/gemm_plan.h"
#include "backends/cuda/gemm_wgmma.h"
#include "backends/cuda/kernels/gemm_mma.cuh"
#include "base/error.h"

namespace mla::cuda {
namespace {

bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Rows of an operand can be copied 16 bytes at a time.
void check_operand(const char* name, const void* data, int64_t row_stride, int64_t batch_stride) {
  MLA_CHECK_SHAPE(aligned(data, 16) && row_stride % 8 == 0 && batch_stride % 8 == 0, name,
                  ": rows must begin at multiples of 16 bytes, got strides of ", row_stride,
                  " and ", batch_stride, " elements");
}

void check_dense(const Gemm& g) {
  MLA_CHECK_SHAPE(g.m >= 0 && g.n >= 0 && g.k >= 0 && g.n_batch >= 0, "gemm: negative size");
  check_operand("gemm: a", g.a, g.lda, g.batch_a);
  check_operand("gemm: b", g.b, g.ldb, g.batch_b);
  check_operand("gemm: b_up", g.b_up, g.ldb, g.batch_b);
  MLA_CHECK_SHAPE(g.b_up == nullptr || g.residual == nullptr,
                  "gemm: a fused product takes no residual");
}

void check_grouped(const GroupedGemm& g) {
  MLA_CHECK_SHAPE(g.n_rows >= 0 && g.n >= 0 && g.k >= 0, "grouped_gemm: negative size");
  MLA_CHECK_SHAPE(g.n_experts >= 0 && g.n_experts <= kMaxGroupedExperts,
                  "grouped_gemm: ", g.n_experts, " experts; at most ", kMaxGroupedExperts,
                  " at once");
  check_operand("grouped_gemm: a", g.a, g.lda, 0);
  check_operand("grouped_gemm: b", g.b, g.ldb, g.expert_stride);
  check_operand("grouped_gemm: b_up", g.b_up, g.ldb, g.expert_stride);
}

// Whether two adjacent floats (or two adjacent halves of c) may be written at once.
bool pairs_aligned(const GemmParams& p) {
  const bool c = aligned(p.c, p.half_result ? 4 : 8) && p.ldc % 2 == 0 && p.batch_c % 2 == 0;
  const bool residual =
      p.residual == nullptr ||
      (aligned(p.residual, 8) && p.ld_residual % 2 == 0 && p.batch_residual % 2 == 0);
  return c && residual && (p.n_split == 1 || p.n % 2 == 0);
}

GemmParams params(const Gemm& g, const GemmPlan& plan) {
  GemmParams p = {};
  p.m = g.m, p.n = g.n, p.k = g.k;
  p.a = g.a, p.b = g.b, p.b_up = g.b_up, p.c = g.c;
  p.lda = g.lda, p.ldb = g.ldb, p.ldc = g.ldc;
  p.half_result = g.result == Result::f16;
  p.row_scale = g.row_scale, p.residual = g.residual, p.ld_residual = g.ld_residual;
  p.m_limit = g.m_limit, p.n_batch = g.n_batch;
  p.batch_a = g.batch_a, p.batch_b = g.batch_b, p.batch_c = g.batch_c;
  p.batch_scale = g.batch_scale, p.batch_residual = g.batch_residual;
  p.n_split = plan.n_split, p.k_split = plan.k_split;
  p.partial = reinterpret_cast<float*>(g.scratch);
  p.paired_stores = pairs_aligned(p);
  return p;
}

GemmParams params(const GroupedGemm& g, const GemmPlan& plan) {
  GemmParams p = {};
  p.m = g.n_rows, p.n = g.n, p.k = g.k;
  p.a = g.a, p.b = g.b, p.b_up = g.b_up, p.c = g.c;
  p.lda = g.lda, p.ldb = g.ldb, p.ldc = g.ldc;
  p.half_result = g.result == Result::f16;
  p.row_scale = g.row_scale;
  p.n_batch = 1, p.batch_b = g.expert_stride;
  p.n_split = 1, p.k_split = plan.k_split;
  p.offsets = g.offsets, p.sorted_pairs = g.sorted_pairs;
  p.first_expert = g.first_expert, p.n_experts = g.n_experts;
  p.pairs_per_row = g.pairs_per_row, p.scatter = g.scatter;
  p.paired_stores = pairs_aligned(p);
  return p;
}

unsigned dim(int64_t n) { return static_cast<unsigned>(n); }

template <class Element, int TileM, int TileN>
void launch_mma(const CudaRun& run, const GemmPlan& plan, const GemmParams& p) {
  launch(run, gemm_mma<Element, TileM, TileN>, dim3(dim(plan.grid)), dim3(kMmaThreads),
         mma_smem_bytes(TileM, TileN), p);
}

template <class Element>
void launch_mma(const CudaRun& run, const GemmPlan& plan, const GemmParams& p) {
  if (plan.tile_m == 128) return launch_mma<Element, 128, 128>(run, plan, p);
  if (plan.tile_n == 128) return launch_mma<Element, 64, 128>(run, plan, p);
  launch_mma<Element, 64, 64>(run, plan, p);
}

void launch_planned(const CudaRun& run, Operand operand, const GemmPlan& plan,
                    const GemmParams& p) {
  if (plan.path == GemmPlan::Path::wgmma) return launch_wgmma(run, operand, plan, p);
  if (operand == Operand::f16) return launch_mma<__half>(run, plan, p);
  launch_mma<__nv_bfloat16>(run, plan, p);
}

size_t partial_bytes(const Gemm& g, const GemmPlan& plan) {
  if (plan.n_split == 1) return 0;
  return sizeof(float) * static_cast<size_t>(plan.n_split) * static_cast<size_t>(g.n_batch) *
         static_cast<size_t>(g.m) * static_cast<size_t>(g.n);
}

}  // namespace

size_t gemm_scratch_bytes(const Gemm& g, const DeviceInfo& device) {
  return partial_bytes(g, plan_gemm(g, device, has_wgmma(device)));
}

void gemm(const CudaRun& run, const Gemm& g) {
  check_dense(g);
  const int64_t n_results = int64_t{g.n_batch} * g.m * g.n;
  if (n_results == 0) return;
  GemmPlan plan = plan_gemm(g, run.device, has_wgmma(run.device));
  if (partial_bytes(g, plan) > g.scratch_bytes) plan.n_split = 1, plan.k_split = std::max(g.k, 1);
  const GemmParams p = params(g, plan);
  launch_planned(run, g.operand, plan, p);
  if (plan.n_split == 1) return;
  launch(run, gemm_add_parts, dim3(dim((n_results + kMmaThreads - 1) / kMmaThreads)),
         dim3(kMmaThreads), 0, p);
}

void grouped_gemm(const CudaRun& run, const GroupedGemm& g) {
  check_grouped(g);
  if (g.n_rows == 0 || g.n == 0 || g.n_experts == 0) return;
  const GemmPlan plan = plan_grouped_gemm(g, run.device, has_wgmma(run.device));
  launch_planned(run, g.operand, plan, params(g, plan));
}

}  // namespace mla::cuda
