// Launches of the products with k_b and v_b.
#include <algorithm>

#include "backends/cuda/attention_absorbed.h"
#include "backends/cuda/kernels/attention_values.cuh"

namespace mla::cuda {
namespace {

constexpr int kMaxNope = 32 * kGroup;  // a warp takes a row of k_b at once

template <class T>
void queries(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run) {
  const int n_tokens = plan.end_token - plan.first_token;
  const auto n_tiles = static_cast<unsigned>((n_tokens + kTileTokens - 1) / kTileTokens);
  const int columns = a.k_b_transposed ? kGroup : rows_at_a_time(a.n);
  const int n_slabs = (a.c + columns - 1) / columns + 1;
  const dim3 grid(static_cast<unsigned>((warps_list(a) ? 0 : 1) + a.h * n_slabs), n_tiles);
  const int along = kTileTokens * n_groups(a.n) * kGroupPitch;
  const int across = kProductThreads * (kGroup + 1) + kTileTokens * a.n;
  const size_t smem = static_cast<size_t>(a.k_b_transposed ? across : along) * sizeof(float);
  with_weight_format(a.k_b.format, [&](auto format) {
    constexpr Format F = decltype(format)::value;
    const auto kernel = a.k_b_transposed ? queries_across<F, T> : queries_along<F, T>;
    launch(run, kernel, grid, dim3(kProductThreads), smem, a, plan, n_slabs);
  });
}

// As few slabs as keep the SMs busy: each merges the parts of its tokens anew.
ValuesGrid values_grid(const AttentionArgs& a, int n_tokens, int n_sm) {
  ValuesGrid grid;
  grid.tokens = 1;
  while (grid.tokens < kTileTokens && grid.tokens < n_tokens) grid.tokens *= 2;
  const int n_tiles = (n_tokens + grid.tokens - 1) / grid.tokens;
  const int at_a_time = rows_at_a_time(a.c);
  const int most = std::max((a.v + at_a_time - 1) / at_a_time, 1);
  const int wanted = std::clamp((n_sm + a.h * n_tiles - 1) / (a.h * n_tiles), 1, most);
  grid.slab_rows = (most + wanted - 1) / wanted * at_a_time;
  grid.n_slabs = (a.v + grid.slab_rows - 1) / grid.slab_rows;
  return grid;
}

template <class T>
void values(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run) {
  const int n_tokens = plan.end_token - plan.first_token;
  const ValuesGrid grid = values_grid(a, n_tokens, run.device.n_sm);
  const dim3 blocks(static_cast<unsigned>(a.h * grid.n_slabs),
                    static_cast<unsigned>((n_tokens + grid.tokens - 1) / grid.tokens));
  const size_t smem = static_cast<size_t>(values_smem_floats(grid.tokens)) * sizeof(float);
  with_weight_format(a.v_b.format, [&](auto format) {
    launch(run, values_kernel<decltype(format)::value, T>, blocks, dim3(kProductThreads), smem, a,
           plan, grid);
  });
}

}  // namespace

bool products_fit(const AttentionArgs& a) { return a.n <= kMaxNope && a.c <= kLatentDims; }

void launch_queries(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run) {
  if (plan.x != nullptr) return launch_batched_queries(a, plan, run);
  operand_is_bf16(a) ? queries<__nv_bfloat16>(a, plan, run) : queries<__half>(a, plan, run);
}

void launch_values(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run) {
  if (plan.x != nullptr) return launch_batched_values(a, plan, run);
  operand_is_bf16(a) ? values<__nv_bfloat16>(a, plan, run) : values<__half>(a, plan, run);
}

}  // namespace mla::cuda
