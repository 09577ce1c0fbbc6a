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
__device__ inline RowParts parts_of(const AttentionArgs& a, const AbsorbedPlan& plan, int entry_row,
                                    int token, int head, int operand_bytes) {
  const WorkEntry* entry = plan.entries + entry_row;
  const WorkEntry narrow = load_entry(entry);  // spans are the same for both variants
  const int v = variant_of(a, plan, narrow.span());
  const WorkEntry e = v == kNarrow ? narrow : load_entry(entry + a.n_spans);
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

// This warp's share (parts share, share + n_shares, ..) of the weighted sum of a row's parts.
// Returns the sum of all weights.
template <class T>
__device__ float merge_parts(const RowParts& p, int share, int n_shares,
                             float (&sum)[kLaneColumns]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float top = kMinusInf;
  for (int i = lane; i < p.n; i += 32) top = fmaxf(top, load_coherent(p.lse + i * p.stride));
  top = warp_max(top);
  float weights = 0.0f;
  for (int i = lane; i < p.n; i += 32) {
    weights += exp2_approx(load_coherent(p.lse + i * p.stride) - top);
  }
#pragma unroll 4
  for (int i = share; i < p.n; i += n_shares) {
    const float weight = exp2_approx(load_coherent(p.lse + i * p.stride) - top);
    const auto* row =
        reinterpret_cast<const uint4*>(p.parts + i * p.stride * kLatentDims * int64_t{sizeof(T)});
    const uint4 chunks[2] = {load_coherent(row + lane), load_coherent(row + 32 + lane)};
    const T* x = reinterpret_cast<const T*>(chunks);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      // A part that saw nothing may hold anything.
      if (weight != 0.0f) sum[c] = fmaf(weight, from_operand(x[c]), sum[c]);
    }
  }
  return warp_sum(weights);
}

// latents[token][groups][kGroupPitch] of the tile; absorbed[token]: whether it is anyone's.
template <class T>
__device__ void merge_tile(const AttentionArgs& a, const AbsorbedPlan& plan, const ValuesGrid& grid,
                           int head, int first, float* latents, float* shares, int* state) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int n_shares = kProductWarps / grid.tokens;
  const int token = first + warp % grid.tokens;
  int entry = kOtherToken;
  if (token < plan.end_token) entry = plan.token_entry[token - plan.first_token];
  if (warp < grid.tokens && lane == 0) state[warp] = entry;
  float sum[kLaneColumns] = {};
  if (entry >= 0) {
    const RowParts parts = parts_of(a, plan, entry, token, head, sizeof(T));
    const float weights = merge_parts<T>(parts, warp / grid.tokens, n_shares, sum);
    for (float& x : sum) x /= weights;
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int c = i / 8 * 256 + lane * 8 + i % 8;
    shares[warp * kLatentDims + c] = sum[i];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < grid.tokens * kLatentDims; at += kProductThreads) {
    const int i = at / kLatentDims, c = at % kLatentDims;
    float total = 0.0f;
    for (int s = 0; s < n_shares; ++s) total += shares[(s * grid.tokens + i) * kLatentDims + c];
    latents[(i * (kLatentDims / kGroup) + c / kGroup) * kGroupPitch + c % kGroup] = total;
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
  __shared__ int state[kTileTokens];
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
      if (state[i] == kOtherToken) continue;
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
