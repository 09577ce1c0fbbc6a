// Launches of the products of many tokens, see kernels/attention_batched.cuh.
#include "backends/cuda/attention_absorbed.h"
#include "backends/cuda/dequantize.h"
#include "backends/cuda/kernels/attention_batched.cuh"

namespace mla::cuda {
namespace {

// Below, reading the weights anew for each 8 tokens takes less time than two kernels more.
constexpr int kLeastTokens = 8;
constexpr int kLeastRows = 512;

int n_tokens(const AbsorbedPlan& plan) { return plan.end_token - plan.first_token; }

unsigned row_blocks(const AttentionArgs& a, const AbsorbedPlan& plan) {
  return static_cast<unsigned>((n_tokens(plan) * a.h + kProductWarps - 1) / kProductWarps);
}

// w [H, N, K] as the right operand of a product for each head: as it is, or decoded.
void set_weights(const CudaRun& run, const View& w, const AbsorbedPlan& plan, Gemm& g) {
  constexpr int64_t kBytes = 16;
  const bool as_it_is = w.format == Format::F16 && w.stride[3] == int64_t{sizeof(__half)} &&
                        reinterpret_cast<uintptr_t>(w.data) % kBytes == 0 &&
                        w.stride[1] % kBytes == 0 && w.stride[2] % kBytes == 0;
  if (as_it_is) {
    g.b = w.data;
    g.ldb = w.stride[2] / int64_t{sizeof(__half)};
    g.batch_b = w.stride[1] / int64_t{sizeof(__half)};
  } else {
    dequantize_rows(run, w, 0, w.extent[1] * w.extent[2], Operand::f16, plan.weights, w.extent[3]);
    g.b = plan.weights;
    g.ldb = w.extent[3];
    g.batch_b = w.extent[2] * w.extent[3];
  }
  g.n = static_cast<int>(w.extent[2]);
  g.k = static_cast<int>(w.extent[3]);
  g.n_batch = static_cast<int>(w.extent[1]);
}

}  // namespace

bool batches_products(const AttentionArgs& a) {
  const int tokens = std::min(absorbed_window(a), a.t);
  return tokens >= kLeastTokens && tokens * a.h >= kLeastRows && !operand_is_bf16(a) &&
         !a.k_b_transposed && operand_of(a.k_b.format) == Operand::f16 &&
         operand_of(a.v_b.format) == Operand::f16 && a.n % 8 == 0 && a.c % 8 == 0;
}

void launch_batched_queries(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run) {
  const dim3 grid(row_blocks(a, plan) + (warps_list(a) ? 0 : 1));
  launch(run, prepare_queries, grid, dim3(kProductThreads), 0, a, plan);
  Gemm g;
  set_weights(run, a.k_b, plan, g);
  g.result = Result::f16;
  g.m = n_tokens(plan);
  g.a = plan.x;
  g.lda = a.n;
  g.batch_a = int64_t{g.m} * a.n;
  g.c = plan.q;
  g.ldc = int64_t{a.h} * kKeyDims;
  g.batch_c = kKeyDims;
  g.row_scale = plan.x_scale;
  g.batch_scale = g.m;
  gemm(run, g);
}

void launch_batched_values(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run) {
  auto* latents = reinterpret_cast<__half*>(plan.q);  // of as many rows, which are longer
  launch(run, merge_latents, dim3(row_blocks(a, plan)), dim3(kProductThreads), 0, a, plan, latents);
  Gemm g;
  set_weights(run, a.v_b, plan, g);
  g.m = n_tokens(plan);
  g.a = latents;
  g.lda = kLatentDims;
  g.batch_a = int64_t{g.m} * kLatentDims;
  g.c = a.out + int64_t{plan.first_token} * a.h * a.v;
  g.ldc = int64_t{a.h} * a.v;
  g.batch_c = a.v;
  gemm(run, g);
}

}  // namespace mla::cuda
