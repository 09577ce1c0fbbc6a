// The parts of absorbed attention merged by their weights, then multiplied with v_b:
//
//   o[t, h, c]   = sum_p 2^(lse[p] - top) part[p][c] / sum_p 2^(lse[p] - top)
//   out[t, h, v] = sum_c o[t, h, c] v_b[h, v, c]                              in float32
//
// Merging here and not in the last block of the kernel before: one sequence of 4k positions has 64
// parts of 16 rows, 1 MB, which a single SM reads in 10 us and 128 blocks in less than 1. Each of
// the blocks of a head merges the same rows, which costs reads of L2 only.
// Grid [H * slabs, token tiles]: a slab is `slab_rows` rows of v_b. Before the kernel waits for the
// ones ahead, its rows come into L2 and, where spans are inputs of the graph, each warp finds its
// parts. Tokens in no span become zeros here.
// Error: parts are rounded to the operand's type; float32 from there.
#pragma once

#include "backends/cuda/kernels/attention_queries.cuh"

namespace mla::cuda {

struct ValuesGrid {
  int n_slabs, slab_rows;
  int tokens;  // of a tile: 1, 2, 4 or 8; warps / tokens warps share the merging of a token
};

// The list's row that has the token, or what it is else, see AbsorbedPlan::token_entry. Warps call
// whole.
__device__ inline int find_entry(const AttentionArgs& a, const AbsorbedPlan& plan, int token) {
  if (!warps_list(a)) return plan.token_entry[token - plan.first_token];
  const LaneSpans spans = load_spans(a, plan, 0);
  const Span& s = spans.span;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool has =
      lane < spans.n_listed && token >= s.first_token && token - s.first_token < s.n_tokens;
  const unsigned found = __ballot_sync(0xffffffffu, has);
  if (found == 0) return kIdleToken;
  const int row = __ffs(static_cast<int>(found)) - 1;
  return __shfl_sync(0xffffffffu, s.expanded, row) == 0 ? row : kOtherToken;
}

// Where the parts of one query row are: `unit + block`, for the blocks [first, last].
struct RowParts {
  const std::byte* parts;
  const float* lse;
  int64_t stride;  // from block to block, in rows
  int n;
};
// Of the token's span in the line of variant v.
__device__ inline RowParts parts_of(const AttentionArgs& a, const AbsorbedPlan& plan, int v,
                                    const WorkEntry& e, const WorkTotals& totals, int token,
                                    int head, int operand_bytes) {
  const AbsorbedVariant& variant = plan.variants[v];
  const int n_busy = busy_blocks(variant, totals);
  const int row = (token - e.first_token) * a.h + head;
  const int unit = row / variant.unit_rows();
  const int begin = e.work_before + unit * e.tiles;
  const int first = block_at(totals.work, n_busy, begin);
  const int last = block_at(totals.work, n_busy, begin + e.tiles - 1);
  const int sub = row % variant.unit_rows() / variant.rows;
  const int64_t slot = int64_t{e.units_before + unit + first} * variant.fold + sub;
  const int64_t at = slot * variant.rows + row % variant.rows;
  return {variant.parts + at * kLatentDims * operand_bytes, variant.lse + at,
          int64_t{variant.fold} * variant.rows, last - first + 1};
}

// index: what find_entry gave, not negative. Warps call whole.
__device__ inline RowParts find_parts(const AttentionArgs& a, const AbsorbedPlan& plan, int index,
                                      int token, int head, int operand_bytes) {
  RowParts parts = {};
  for (int v = 0; v < kVariants; ++v) {
    if (plan.variants[v].n_blocks == 0) continue;
    const Line line = find_line(a, plan, v);
    const WorkEntry e = warps_list(a) ? broadcast_entry(line.mine, index)
                                      : load_entry(plan.entries + v * a.n_spans + index);
    if (variant_of(a, plan, e.span()) != v) continue;
    parts = parts_of(a, plan, v, e, line.totals, token, head, operand_bytes);
  }
  return parts;
}

inline constexpr int kLaneColumns = kLatentDims / 32;  // as two chunks of 8, 256 apart
// 16 loads of 16 bytes under way per lane: those of 64 parts, with 8 warps, in one round trip.
inline constexpr int kPartsAtATime = 8;

// A weighted sum of parts: weights are 2^(lse - top).
struct Merged {
  float top, weight;
  float sum[kLaneColumns];
};

// Parts first, first + step, .. of a row. Each round's loads wait for nothing but the round before.
template <class T>
__device__ Merged merge_parts(const RowParts& p, int first, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Merged m = {kMinusInf, 0.0f, {}};
  for (int i = first; i < p.n; i += kPartsAtATime * step) {
    float lse[kPartsAtATime];
    uint4 chunks[kPartsAtATime][2];
#pragma unroll
    for (int j = 0; j < kPartsAtATime; ++j) {
      lse[j] = kMinusInf;
      if (i + j * step >= p.n) continue;
      const int64_t at = (i + j * step) * p.stride;
      const auto* row =
          reinterpret_cast<const uint4*>(p.parts + at * kLatentDims * int64_t{sizeof(T)});
      lse[j] = load_coherent(p.lse + at);
      chunks[j][0] = load_coherent(row + lane);
      chunks[j][1] = load_coherent(row + 32 + lane);
    }
    const float before = m.top;
#pragma unroll
    for (int j = 0; j < kPartsAtATime; ++j) m.top = fmaxf(m.top, lse[j]);
    const float origin = m.top == kMinusInf ? 0.0f : m.top;
    const float factor = exp2_approx(before - origin);
    m.weight *= factor;
    for (float& x : m.sum) x *= factor;
#pragma unroll
    for (int j = 0; j < kPartsAtATime; ++j) {
      if (lse[j] == kMinusInf) continue;  // it may hold anything
      const float weight = exp2_approx(lse[j] - origin);
      m.weight += weight;
      const T* x = reinterpret_cast<const T*>(chunks[j]);
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) {
        m.sum[c] = fmaf(weight, from_operand(x[c]), m.sum[c]);
      }
    }
  }
  return m;
}

// What the warps of a tile hand to each other.
struct TileState {
  int entry[kTileTokens];  // of each token, see AbsorbedPlan::token_entry
  alignas(16) float top[kProductWarps];
  alignas(16) float weight[kProductWarps];
};

__host__ __device__ inline constexpr int latent_at(int token, int c) {
  return (token * (kLatentDims / kGroup) + c / kGroup) * kGroupPitch + c % kGroup;
}

// What the warps of token i of a tile of n have summed, put together. The count is known when the
// code is compiled: every load is under way at once.
template <int kTokens>
__device__ void join_shares(float* latents, const float* shares, const TileState& state) {
  constexpr int kShares = kProductWarps / kTokens;
  for (int at = threadIdx.x * 2; at < kTokens * kLatentDims; at += 2 * kProductThreads) {
    const int i = at / kLatentDims, c = at % kLatentDims;
    float top = kMinusInf, weight = 0.0f, lo = 0.0f, hi = 0.0f;
#pragma unroll
    for (int j = 0; j < kShares; ++j) top = fmaxf(top, state.top[i + j * kTokens]);
    const float origin = top == kMinusInf ? 0.0f : top;
#pragma unroll
    for (int j = 0; j < kShares; ++j) {
      const int from = i + j * kTokens;
      const float factor = exp2_approx(state.top[from] - origin);
      const float2 x = *reinterpret_cast<const float2*>(shares + from * kLatentDims + c);
      weight = fmaf(factor, state.weight[from], weight);
      lo = fmaf(factor, x.x, lo);
      hi = fmaf(factor, x.y, hi);
    }
    // NaN where nothing was seen, as a softmax of nothing is; zeros for others' tokens.
    const float scale = state.entry[i] >= 0 ? 1.0f / weight : 0.0f;
    *reinterpret_cast<float2*>(latents + latent_at(i, c)) = {lo * scale, hi * scale};
  }
}

// What a warp merges, known before pdl_wait() where spans are: see find_line.
struct WarpParts {
  int entry;
  RowParts parts;
};
__device__ inline WarpParts find_warp_parts(const AttentionArgs& a, const AbsorbedPlan& plan,
                                            const ValuesGrid& grid, int head, int first,
                                            int operand_bytes) {
  WarpParts found = {kOtherToken, {}};
  const int token = first + static_cast<int>(threadIdx.x) / 32 % grid.tokens;
  if (token >= plan.end_token) return found;
  if (!a.spans_given || !warps_list(a)) pdl_wait();
  found.entry = find_entry(a, plan, token);
  if (found.entry >= 0) {
    found.parts = find_parts(a, plan, found.entry, token, head, operand_bytes);
  }
  return found;
}

// latents[token][groups][kGroupPitch] of the tile. shares: [kProductWarps][kLatentDims]. load: what
// is asked for meanwhile, once registers are free again.
template <class T, class Load>
__device__ void merge_tile(const WarpParts& found, const ValuesGrid& grid, float* latents,
                           float* shares, TileState& state, const Load& load) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int entry = found.entry;
  Merged m = {kMinusInf, 0.0f, {}};
  if (entry >= 0) {
    m = merge_parts<T>(found.parts, warp / grid.tokens, kProductWarps / grid.tokens);
  }
  if (lane == 0) {
    if (warp < grid.tokens) state.entry[warp] = entry;
    state.top[warp] = m.top;
    state.weight[warp] = m.weight;
  }
  float* share = shares + warp * kLatentDims + lane * 8;
#pragma unroll
  for (int i = 0; i < kLaneColumns; i += 4) {
    *reinterpret_cast<float4*>(share + i / 8 * 256 + i % 8) = {m.sum[i], m.sum[i + 1], m.sum[i + 2],
                                                               m.sum[i + 3]};
  }
  load();
  __syncthreads();
  switch (grid.tokens) {
    case 1:
      join_shares<1>(latents, shares, state);
      break;
    case 2:
      join_shares<2>(latents, shares, state);
      break;
    case 4:
      join_shares<4>(latents, shares, state);
      break;
    default:
      join_shares<8>(latents, shares, state);
  }
  __syncthreads();
}

__host__ __device__ inline constexpr int values_smem_floats(int tokens) {
  return kProductWarps * kLatentDims + tokens * (kLatentDims / kGroup) * kGroupPitch;
}

template <Format F, class T>
__global__ void __launch_bounds__(kProductThreads, 2)
    values_kernel(const __grid_constant__ AttentionArgs a,
                  const __grid_constant__ AbsorbedPlan plan, ValuesGrid grid) {
  float* shares = dynamic_smem<float>();  // [kProductWarps][kLatentDims]
  float* latents = shares + kProductWarps * kLatentDims;
  __shared__ TileState state;
  const int head = static_cast<int>(blockIdx.x) / grid.n_slabs;
  constexpr int kLine = 128;  // bytes that come into L2 at once: a group in float32
  const int lanes = lanes_per_row(a.c);
  const int group = static_cast<int>(threadIdx.x) % lanes;
  const int begin = static_cast<int>(blockIdx.x) % grid.n_slabs * grid.slab_rows;
  const int end = min(begin + grid.slab_rows, a.v);
  float w[kGroup] = {};
  const auto v_row = [&](int v) {
    return a.v_b.data + head * a.v_b.stride[1] + v * a.v_b.stride[2];
  };
  const auto decode_row = [&](int v) {
    if (v < end && group < n_groups(a.c)) weight_group<F>(v_row(v), a.c, group, w);
  };
  const int first_row = begin + static_cast<int>(threadIdx.x) / lanes;
  for (int v = first_row; v < end; v += rows_at_a_time(a.c)) {
    if (group * kLine < a.v_b.stride[2]) prefetch_l2(v_row(v) + group * kLine);
  }
  const int first = plan.first_token + static_cast<int>(blockIdx.y) * grid.tokens;
  const WarpParts found = find_warp_parts(a, plan, grid, head, first, sizeof(T));
  pdl_wait();
  merge_tile<T>(found, grid, latents, shares, state, [&] { decode_row(first_row); });
  const int n = min(grid.tokens, plan.end_token - first);
  for (int v = first_row; v - first_row < end - begin; v += rows_at_a_time(a.c)) {
    if (v != first_row) decode_row(v);
    for (int i = 0; i < n; ++i) {
      if (state.entry[i] == kOtherToken) continue;
      float sum = 0.0f;
      if (group < n_groups(a.c)) {
        sum = dot_group(w, latents + latent_at(i, group * kGroup));
      }
      for (int step = lanes / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
      }
      if (group == 0 && v < end) a.out[(int64_t{first + i} * a.h + head) * a.v + v] = sum;
    }
  }
}

}  // namespace mla::cuda
