// Causal attention of many tokens over expanded keys and values, one head at a time.
//
//   out[t][h] = sum_i p_i V[i][h] / sum_i p_i,  p_i = exp(scale q[t][h] . K[i][h] - max)
//   q [T, H, N] and [T, H, R] F32, any strides; K[i][h] = [keys[i][h] (N) | rope[i] (R)], rope keys
//   shared by all heads; V[i][h] values[i][h]; f16, rows of flat cells (expanded_plan.cuh)
//   -> out [T, H, V] F32
//
// A work item is one head of one tile of queries. Blocks of 4 warps fetch items from a counter, the
// longest first; each warp owns 16 * kMTiles queries, their sums in registers:
//
//   shared  Q [64 * kMTiles][N + R], K [kKeys][N + R], V [kKeys][V], rows padded to 128 bytes, the
//           16-byte pieces of a row permuted by row % 8: eight rows of a column meet all banks
//   step    kKeys cells: S = Q K^T while V arrives, then softmax and O += P V while the next K does
//
// Two blocks share a multiprocessor, so that one multiplies while the other takes exponentials. The
// running maximum and sum of a row (and its O, in `out`) go from round to round of the cells.
//
// Error: operands in f16 (a query row times a power of two, so that none overflows), products and
// sums in float32, exponentials to 2 ulp: relative 2^-11 per operand, normalized mean square error
// below 1e-6 of what the same f16 keys and values give.
#pragma once

#include "backends/cuda/kernels/expanded_steps.cuh"

namespace mla::cuda {

// Shared memory of a block, in the order of expanded_smem_bytes().
struct ExpandedTiles {
  std::byte *q, *k, *v;
  int row_bytes;  // of q and k
};

// Where a thread's rows lie: m-th 16 rows, lower (0) or upper (1) eight.
template <class D>
__device__ inline int tile_row(int m, int half) {
  return warp_id() * D::kWarpRows + 16 * m + 8 * half + lane_id() / 4;
}

// Sums at zero, or as the round before left them.
template <class D>
__device__ inline void begin_rows(const ExpandedArgs& a, const ExpandedJob& job,
                                  const float* row_scale, ExpandedRows<D>& rows) {
  const bool resumes = job.begin > 0;
  // Never 0: 0 times a masked score is no number.
  const float scale = fmaxf(fabsf(a.scale) * 1.44269504f, 1e-30f);
#pragma unroll
  for (int m = 0; m < D::kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile_row<D>(m, half);
      const bool there = resumes && row < job.tile.n_rows;
      const int64_t at = int64_t{job.tile.token + row} * a.h + job.head;
      const float2 before = there ? a.running[at] : float2{kMinusInf, 0.0f};
      rows.factor[m][half] = scale * row_scale[row];
      rows.top[m][half] = before.x;
      rows.sum[m][half] = lane_id() % 4 == 0 ? before.y : 0.0f;
#pragma unroll
      for (int i = 0; i < D::kValueTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = 8 * i + lane_id() % 4 * 2 + j;
          rows.o[m][i][2 * half + j] = there && column < a.v ? a.out[at * a.v + column] : 0.0f;
        }
      }
    }
  }
}

template <class D>
__device__ inline void end_rows(const ExpandedArgs& a, const ExpandedJob& job,
                                const ExpandedRows<D>& rows) {
#pragma unroll
  for (int m = 0; m < D::kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.sum[m][half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const int row = tile_row<D>(m, half);
      if (row >= job.tile.n_rows) continue;
      const int64_t at = int64_t{job.tile.token + row} * a.h + job.head;
      const float factor = job.is_last ? 1.0f / sum : 1.0f;
      if (!job.is_last && lane_id() % 4 == 0) a.running[at] = {rows.top[m][half], sum};
#pragma unroll
      for (int i = 0; i < D::kValueTiles; ++i) {
        const int column = 8 * i + lane_id() % 4 * 2;  // V is even, and so 8 bytes are aligned
        if (!D::kStatic && column >= a.v) continue;
        *reinterpret_cast<float2*>(a.out + at * a.v + column) = {
            rows.o[m][i][2 * half] * factor, rows.o[m][i][2 * half + 1] * factor};
      }
    }
  }
}

template <class D>
__device__ inline void attend(const ExpandedArgs& a, const ExpandedJob& job,
                              const ExpandedTiles& tiles, float* row_scale) {
  const int n_cells = job.end - job.begin;
  const int first_row = warp_id() * D::kWarpRows;
  const int n_pairs = (D::kStatic ? D::kNope + D::kRope : a.dim) / 16;
  // Of the warp's first and last query, counted from job.begin.
  const int visible = job.tile.visible + first_row - job.begin;
  const int last_visible = visible + min(D::kWarpRows, job.tile.n_rows - first_row) - 1;
  load_keys<D>(a, job, 0, tiles.k, tiles.row_bytes);
  load_queries<D>(a, job, tiles.q, tiles.row_bytes, row_scale);
  ExpandedRows<D> rows;
  begin_rows<D>(a, job, row_scale, rows);
  for (int first = 0; first < n_cells; first += D::kKeys) {
    // Warps without a query that sees these cells only copy and wait.
    const bool sees = first_row < job.tile.n_rows && first < last_visible;
    cp_async_wait<0>();
    __syncthreads();
    load_values<D>(a, job, first, tiles.v);
    ExpandedScores<D> s;
    if (sees) {
      multiply_keys<D>(tiles.q, tiles.k, tiles.row_bytes, n_pairs, s);
      if (first + D::kKeys > visible) mask_scores<D>(visible - first, s);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (first + D::kKeys < n_cells)
      load_keys<D>(a, job, first + D::kKeys, tiles.k, tiles.row_bytes);
    if (!sees) continue;
    softmax_step<D>(s, rows);
    multiply_values<D>(tiles.v, a.v / 8, s, rows);
  }
  end_rows<D>(a, job, rows);
}

// Persistent: any grid serves, two blocks per multiprocessor are meant.
template <class D>
__global__ void __launch_bounds__(kExpandedThreads, 2)
    attend_expanded(const __grid_constant__ ExpandedArgs a) {
  __shared__ int next;
  __shared__ ExpandedJob job;  // not in registers, of which the sums leave none
  __shared__ float row_scale[D::kRows];
  pdl_trigger();
  pdl_wait();
  if (a.plan.rows[a.round] == 0) return;
  ExpandedTiles tiles;
  tiles.row_bytes =
      D::kStatic ? expanded_row_bytes(D::kNope + D::kRope) : expanded_row_bytes(a.dim);
  tiles.q = dynamic_smem();
  tiles.k = tiles.q + D::kRows * tiles.row_bytes;
  tiles.v = tiles.k + D::kKeys * tiles.row_bytes;
  const int n_items = *a.plan.n_tiles * a.h;
  if constexpr (!D::kStatic) clear_keys_values<D>(tiles.k, tiles.row_bytes, tiles.v);
  for (;;) {
    __syncthreads();  // all are done with the tiles and the job
    if (threadIdx.x == 0) {
      next = atomicAdd(&a.plan.counters[a.round], 1);
      if (next < n_items) job = find_job(a, next);
    }
    __syncthreads();
    if (next >= n_items) return;
    if (job.begin < job.end) attend<D>(a, job, tiles, row_scale);
  }
}

}  // namespace mla::cuda
