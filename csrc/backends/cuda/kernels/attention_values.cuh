// The parts of absorbed attention merged by their weights, then multiplied with v_b:
//
//   o[t, h, c]   = sum_p 2^(lse[p] - top) part[p][c] / sum_p 2^(lse[p] - top)
//   out[t, h, v] = sum_c o[t, h, c] v_b[h, v, c]                              in float32
//
// Merging here and not in the last block of the kernel before: one sequence of 4k positions has 64
// parts of 16 rows, 1 MB, which a single SM reads in 10 us and 128 blocks in less than 1. Each of
// the blocks of a head merges the same rows, which costs reads of L2 only.
// Grid [H * slabs, token tiles]: a slab is `slab_rows` rows of v_b. The first rows are decoded
// before the kernel waits for the ones ahead. Tokens in no span become zeros here.
// Error: parts are rounded to the operand's type; float32 from there.
#pragma once

#include "backends/cuda/kernels/attention_queries.cuh"

namespace mla::cuda {

struct ValuesGrid {
  int n_slabs, slab_rows;
  int tokens;  // of a tile: 1, 2, 4 or 8; warps / tokens warps share the merging of a token
};

// Where the parts of one query row are: `unit + block`, for the blocks [first, last].
struct RowParts {
  const std::byte* parts;
  const float* lse;
  int64_t stride;  // from block to block, in rows
  int n;
};
// index: the token's span. All loads are issued together; spans are the same for both variants.
__device__ inline RowParts parts_of(const AttentionArgs& a, const AbsorbedPlan& plan, int index,
                                    int token, int head, int operand_bytes) {
  const WorkEntry narrow = load_entry(plan.entries + index);
  const WorkEntry wide = load_entry(plan.entries + a.n_spans + index);
  const int v = variant_of(a, plan, narrow.span());
  const WorkEntry& e = v == kNarrow ? narrow : wide;
  const AbsorbedVariant& variant = plan.variants[v];
  const WorkTotals totals = plan.totals[v];
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

inline constexpr int kLaneColumns = kLatentDims / 32;  // as two chunks of 8, 256 apart
inline constexpr int kPartsAtATime = 4;                // 8 loads of 16 bytes under way per lane

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
      const int64_t at = min(i + j * step, p.n - 1) * p.stride;
      const auto* row =
          reinterpret_cast<const uint4*>(p.parts + at * kLatentDims * int64_t{sizeof(T)});
      lse[j] = i + j * step < p.n ? load_coherent(p.lse + at) : kMinusInf;
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
      const float weight = exp2_approx(lse[j] - origin);
      m.weight += weight;
      const T* x = reinterpret_cast<const T*>(chunks[j]);
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) {
        // A part that saw nothing may hold anything.
        if (weight != 0.0f) m.sum[c] = fmaf(weight, from_operand(x[c]), m.sum[c]);
      }
    }
  }
  return m;
}

// What the warps of a tile hand to each other.
struct TileState {
  int entry[kTileTokens];  // of each token, see AbsorbedPlan::token_entry
  float top[kProductWarps], weight[kProductWarps];
};

// latents[token][groups][kGroupPitch] of the tile. shares: [kProductWarps][kLatentDims].
template <class T>
__device__ void merge_tile(const AttentionArgs& a, const AbsorbedPlan& plan, const ValuesGrid& grid,
                           int head, int first, float* latents, float* shares, TileState& state) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int n_shares = kProductWarps / grid.tokens;
  const int token = first + warp % grid.tokens;
  int entry = kOtherToken;
  if (token < plan.end_token) entry = plan.token_entry[token - plan.first_token];
  Merged m = {kMinusInf, 0.0f, {}};
  if (entry >= 0) {
    m = merge_parts<T>(parts_of(a, plan, entry, token, head, sizeof(T)), warp / grid.tokens,
                       n_shares);
  }
  if (lane == 0) {
    if (warp < grid.tokens) state.entry[warp] = entry;
    state.top[warp] = m.top;
    state.weight[warp] = m.weight;
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    shares[warp * kLatentDims + i / 8 * 256 + lane * 8 + i % 8] = m.sum[i];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < grid.tokens * kLatentDims; at += kProductThreads) {
    const int i = at / kLatentDims, c = at % kLatentDims;
    float top = kMinusInf, weight = 0.0f, sum = 0.0f;
    for (int from = i; from < kProductWarps; from += grid.tokens) top = fmaxf(top, state.top[from]);
    for (int from = i; from < kProductWarps; from += grid.tokens) {
      const float factor = top == kMinusInf ? 1.0f : exp2_approx(state.top[from] - top);
      weight = fmaf(factor, state.weight[from], weight);
      sum = fmaf(factor, shares[from * kLatentDims + c], sum);
    }
    const bool absorbed = state.entry[i] >= 0;
    latents[(i * (kLatentDims / kGroup) + c / kGroup) * kGroupPitch + c % kGroup] =
        absorbed ? sum / weight : 0.0f;
  }
  __syncthreads();
}

__host__ __device__ inline constexpr int values_smem_floats(int tokens) {
  return kProductWarps * kLatentDims + tokens * (kLatentDims / kGroup) * kGroupPitch;
}

template <Format F, class T>
__global__ void __launch_bounds__(kProductThreads)
    values_kernel(const __grid_constant__ AttentionArgs a,
                  const __grid_constant__ AbsorbedPlan plan, ValuesGrid grid) {
  pdl_trigger();
  float* shares = dynamic_smem<float>();  // [kProductWarps][kLatentDims]
  float* latents = shares + kProductWarps * kLatentDims;
  __shared__ TileState state;
  const int head = static_cast<int>(blockIdx.x) / grid.n_slabs;
  const int lanes = lanes_per_row(a.c);
  const int group = static_cast<int>(threadIdx.x) % lanes;
  const int begin = static_cast<int>(blockIdx.x) % grid.n_slabs * grid.slab_rows;
  const int end = min(begin + grid.slab_rows, a.v);
  float w[kGroup] = {};
  const auto decode_row = [&](int v) {
    if (v >= end || group >= n_groups(a.c)) return;
    weight_group<F>(a.v_b.data + head * a.v_b.stride[1] + v * a.v_b.stride[2], a.c, group, w);
  };
  const int first_row = begin + static_cast<int>(threadIdx.x) / lanes;
  decode_row(first_row);
  pdl_wait();
  const int first = plan.first_token + static_cast<int>(blockIdx.y) * grid.tokens;
  merge_tile<T>(a, plan, grid, head, first, latents, shares, state);
  const int n = min(grid.tokens, plan.end_token - first);
  for (int v = first_row; v - first_row < end - begin; v += rows_at_a_time(a.c)) {
    if (v != first_row) decode_row(v);
    for (int i = 0; i < n; ++i) {
      if (state.entry[i] == kOtherToken) continue;
      float sum = 0.0f;
      if (group < n_groups(a.c)) {
        sum = dot_group(w, latents + (i * (kLatentDims / kGroup) + group) * kGroupPitch);
      }
      for (int step = lanes / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
      }
      if (group == 0 && v < end) a.out[(int64_t{first + i} * a.h + head) * a.v + v] = sum;
    }
  }
}

}  // namespace mla::cuda
