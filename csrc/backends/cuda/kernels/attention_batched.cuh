// The products of many tokens with k_b and v_b, by gemm.h: what goes into them and between them.
//
//   x[h, t]  = q_nope[t, h] / s          s: a power of two that puts the largest of the row in
//                                        [2^14, 2^15); x_scale[h, t] = s f
//   q[t, h]  = x_scale x k_b[h]^T        the first C of its 576; the rest is written here
//   o[h, t]  = sum_p 2^(lse[p] - top) part[p] / sum_p 2^(lse[p] - top)        in place of q
//   out[t, h] = o[h, t] v_b[h]^T
//
// with f = scale * log2(e). From 8 tokens on weights are read once instead of once per 8 tokens,
// and tensor cores multiply: f16 operands alone, see batches_products().
// A warp per row; blocks of kProductThreads. Error: x and o rounded to 11 bits.
#pragma once

#include "backends/cuda/kernels/attention_values.cuh"

namespace mla::cuda {

struct BatchedRow {
  int token, head;  // token of the window
  bool is;
};
__device__ inline BatchedRow batched_row(const AttentionArgs& a, const AbsorbedPlan& plan,
                                         int first_block) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int row = (static_cast<int>(blockIdx.x) - first_block) * kProductWarps + warp;
  return {row / a.h, row % a.h, row < (plan.end_token - plan.first_token) * a.h};
}

// Grid: a warp for each row, and one block more, the first, where work is listed in memory.
__global__ void __launch_bounds__(kProductThreads)
    prepare_queries(const __grid_constant__ AttentionArgs a,
                    const __grid_constant__ AbsorbedPlan plan) {
  pdl_wait();
  if (lists_work(a, plan)) return;
  const BatchedRow at = batched_row(a, plan, warps_list(a) ? 0 : 1);
  if (!at.is) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int token = plan.first_token + at.token;
  const int n_tokens = plan.end_token - plan.first_token;
  float largest = 0.0f;
  for (int i = lane; i < a.n; i += 32) {
    largest = fmaxf(largest, fabsf(query_value(a.q_nope, token, at.head, i)));
  }
  largest = warp_max(largest);
  // 2^-100 < s < 2^100, so that neither it nor its inverse overflows.
  constexpr int kLimit = 100, kTop = 14;
  int exponent = 0;
  if (largest > 0.0f && largest < INFINITY) exponent = ilogbf(largest) - kTop;
  exponent = max(min(exponent, kLimit), -kLimit);
  const float inverse = ldexpf(1.0f, -exponent);
  const float factor = a.scale * 1.44269504088896341f;
  const int64_t row = int64_t{at.head} * n_tokens + at.token;
  if (lane == 0) plan.x_scale[row] = factor * ldexpf(1.0f, exponent);
  for (int i = lane; i < a.n; i += 32) {
    const float x = query_value(a.q_nope, token, at.head, i);
    plan.x[row * a.n + i] = to_operand<__half>(x * inverse);
  }
  __half* q = reinterpret_cast<__half*>(plan.q) + (int64_t{at.token} * a.h + at.head) * kKeyDims;
  for (int d = lane; d < kRopeDims; d += 32) {
    const float x = d < a.r ? roped_value(a, token, at.head, d) : 0.0f;
    q[kLatentDims + d] = to_operand<__half>(factor * x);
  }
  for (int d = a.c + lane; d < kLatentDims; d += 32) q[d] = to_operand<__half>(0.0f);
}

// Grid: a warp for each row. latents [H, tokens, kLatentDims]; zeros for tokens that are not
// absorbed.
__global__ void __launch_bounds__(kProductThreads, 2)
    merge_latents(const __grid_constant__ AttentionArgs a,
                  const __grid_constant__ AbsorbedPlan plan, __half* latents) {
  pdl_wait();
  const BatchedRow at = batched_row(a, plan, 0);
  if (!at.is) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int token = plan.first_token + at.token;
  const int entry = find_entry(a, plan, token);
  Merged m = {kMinusInf, 1.0f, {}};
  if (entry >= 0) {
    m = merge_parts<__half>(find_parts(a, plan, entry, token, at.head, sizeof(__half)), 0, 1);
  }
  const float scale = 1.0f / m.weight;
  const int64_t row = int64_t{at.head} * (plan.end_token - plan.first_token) + at.token;
  auto* to = reinterpret_cast<uint4*>(latents + row * kLatentDims);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* x = m.sum + half * 8;
    to[half * 32 + lane] = make_uint4(pack_operands<__half>(x[0] * scale, x[1] * scale),
                                      pack_operands<__half>(x[2] * scale, x[3] * scale),
                                      pack_operands<__half>(x[4] * scale, x[5] * scale),
                                      pack_operands<__half>(x[6] * scale, x[7] * scale));
  }
}

}  // namespace mla::cuda
