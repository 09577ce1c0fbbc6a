// A block's job in small_batch.cuh: which rows of x it multiplies, where fragments find them, and
// what becomes of the sums.
//
// Rows of the job are result rows of the grid (product.h), in the order of that; columns of the
// products are rows of the job. Partial sums are added in the order of the warps that divide k.
#pragma once

#include "backends/cuda/kernels/staged_rows.cuh"
#include "backends/cuda/product_kernels.h"

namespace mla::cuda {

inline constexpr int kTileRows = 16;  // of w

// What a block's threads know of its job.
struct JobState {
  int rows[kMaxRoutedPairs];  // result rows; ~row: its id is no expert
  float scales[kMaxSmallRows];
  int largest[kMaxSmallRows];
  int experts[kMaxSlots];
  float factors[kMaxSlots];
  int warp_counts[kSmallBatchWarps];
};

namespace small_batch {

// ---- the job ------------------------------------------------------------------------------------

// Lists the rows routed to `expert` in rising order; ids that are no expert are those of the first.
__device__ __forceinline__ int find_routed_rows(const Product& p, int expert, JobState& state) {
  const int n_pairs = p.extent[1] * p.extent[2];
  int count = 0;
  for (int first = 0; first < n_pairs; first += kSmallBatchThreads) {
    const int pair = first + static_cast<int>(threadIdx.x);
    const int id = pair < n_pairs ? expert_of(p, pair) : -1;
    const bool mine = pair < n_pairs && max(id, 0) == expert;
    const unsigned lanes = __ballot_sync(kAllLanes, mine);
    if (lane_id() == 0) state.warp_counts[warp_id()] = __popc(lanes);
    __syncthreads();
    int at = count + __popc(lanes & ((1u << lane_id()) - 1u));
    for (int i = 0; i < kSmallBatchWarps; ++i) {
      if (i < warp_id()) at += state.warp_counts[i];
      count += state.warp_counts[i];
    }
    if (mine) state.rows[at] = id < 0 ? ~pair : pair;
    __syncthreads();
  }
  return count;
}

// Fills state.rows and returns their number. All threads meet inside.
__device__ __forceinline__ int find_rows(const SmallBatch& b, int job, JobState& state) {
  const Product& p = b.product;
  const int i = static_cast<int>(threadIdx.x);
  if (b.jobs == Jobs::experts) return find_routed_rows(p, job, state);
  int count = 1;
  if (b.jobs == Jobs::matrices) {
    count = static_cast<int>(p.rows_per_matrix());
    if (i < count) state.rows[i] = row_of_matrix(p, job, i);
  } else if (b.jobs == Jobs::pairs && i == 0) {
    const int expert = expert_of(p, job);
    state.experts[0] = max(expert, 0);
    state.rows[0] = expert < 0 ? ~job : job;
  } else if (b.jobs == Jobs::sums && i < p.n_slots) {
    const int row = job * p.extent[2] + i;
    const int expert = expert_of(p, row);
    state.experts[i] = max(expert, 0);
    state.factors[i] = expert < 0 ? NAN : weight_of(p, row);
    if (i == 0) state.rows[0] = row;
  }
  __syncthreads();
  return count;
}

__device__ __forceinline__ int valid_row(int row) { return row < 0 ? ~row : row; }

// Where a kernel before staged the x of a result row.
__device__ __forceinline__ int staged_row(const SmallBatch& b, int row) {
  return b.product.slots_share_x() ? row / b.product.extent[2] : row;
}

// ---- rows of x ----------------------------------------------------------------------------------

// Where a lane finds its column of each tile of staged rows, and how many rows there are.
template <int NT>
struct Columns {
  const std::byte* base;
  uint32_t offset[NT];  // this lane's 16 bytes of a group included
  int n_rows;
  // Without a branch for the tiles that are nearly always there: they share their fragments.
  __device__ __forceinline__ bool any(int tile) const {
    return NT <= 2 || 2 * tile < NT || 4 * NT < n_rows;
  }
};

// Rows first .. first + n_rows of the job, as fragments find them: staged here or by a kernel
// before. Returns where they lie; state.scales holds their scales, and factors those of the slots.
template <RowLayout L>
__device__ __forceinline__ const std::byte* stage_job(const SmallBatch& b, int first, int n_rows,
                                                      JobState& state) {
  const Product& p = b.product;
  const int i = static_cast<int>(threadIdx.x);
  const bool sums = b.jobs == Jobs::sums;
  if (b.staged != nullptr) {
    if (i < n_rows) state.scales[i] = b.scales[staged_row(b, valid_row(state.rows[first + i]))];
    if (sums && i < p.n_slots) state.factors[i] *= b.scales[staged_row(b, state.rows[0] + i)];
    __syncthreads();
    return b.staged;
  }
  const int n_staged = sums ? (p.slots_share_x() ? 1 : p.n_slots) : n_rows;
  if (i < n_staged) state.largest[i] = 0;
  __syncthreads();
  std::byte* out = dynamic_smem() + b.x_at;
  staged::stage_rows<L>(
      p, b.fours, n_staged,
      [&](int row) {
        return x_row(p, sums ? state.rows[0] + row : valid_row(state.rows[first + row]));
      },
      b.pitch, out, state.scales, state.largest);
  __syncthreads();
  if (sums && i < p.n_slots) state.factors[i] *= state.scales[p.slots_share_x() ? 0 : i];
  __syncthreads();
  return out;
}

template <int NT>
__device__ __forceinline__ void place_columns(const SmallBatch& b, const JobState& state, int first,
                                              Columns<NT>& x) {
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    const int column = min(8 * nt + lane_id() / 4, x.n_rows - 1);
    const int row =
        b.staged == nullptr ? column : staged_row(b, valid_row(state.rows[first + column]));
    x.offset[nt] = static_cast<uint32_t>(row) * static_cast<uint32_t>(b.pitch) +
                   16u * static_cast<uint32_t>(lane_id() % 4);
  }
}

// ---- results ------------------------------------------------------------------------------------

// Adds the slices' sums of every strip and writes what the block's threads find of the tile.
// parts [segment][warp][tile][lane] float4, one segment or the two of a swiglu.
template <int NT>
__device__ __forceinline__ void finish_tile(const SmallBatch& b, const JobState& state,
                                            const float4* parts, int first, int n_rows, int tile,
                                            int row_begin, int row_end) {
  const Product& p = b.product;
  const int n_strips = kSmallBatchWarps / b.split;
  const bool gated = p.swiglu;
  for (int i = static_cast<int>(threadIdx.x); i < n_strips * NT * kWarpThreads;
       i += kSmallBatchThreads) {
    const int strip = i / (NT * kWarpThreads), within = i % (NT * kWarpThreads);
    const int lane = within % kWarpThreads, nt = within / kWarpThreads;
    float sums[2][4] = {};
    for (int s = 0; s < (gated ? 2 : 1); ++s) {
      for (int slice = 0; slice < b.split; ++slice) {
        const int warp = s * kSmallBatchWarps + strip * b.split + slice;
        const float4 part = parts[warp * NT * kWarpThreads + within];
        sums[s][0] += part.x;
        sums[s][1] += part.y;
        sums[s][2] += part.z;
        sums[s][3] += part.w;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = 8 * nt + 2 * (lane % 4) + j % 2;
      const int n = row_begin + (tile * n_strips + strip) * kTileRows + lane / 4 + 8 * (j / 2);
      if (column >= n_rows || n >= row_end) continue;
      const int row = state.rows[first + column];
      const float scale = row < 0 ? NAN : b.jobs == Jobs::sums ? 1.0f : state.scales[column];
      float value = scale * sums[0][j];
      if (gated) value = silu_exact(value) * (scale * sums[1][j]);
      finish_product(p, b.finish, valid_row(row), n, value);
    }
  }
}

}  // namespace small_batch

}  // namespace mla::cuda
