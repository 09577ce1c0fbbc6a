// What the blocks of small_batch.cuh do: which rows of x meet which matrix, and which block does
// how much of it.
//
// A job is a matrix with up to 8 * NT rows of x, its columns: those of a plain product's matrix, or
// those routed to an expert, in rising order, which all blocks must agree on. The work is, job by
// job, tiles of rows of w, and of each its steps along k; blocks take equal runs of steps. Where a
// tile belongs to several blocks, each leaves its sums, and the last to do so adds all in their
// order.
#pragma once

#include "backends/cuda/kernels/staged_rows.cuh"
#include "backends/cuda/product_kernels.h"

namespace mla::cuda {

struct Job {
  int matrix;
  int first, count;  // columns, among those of the matrix or of all experts
};

// Routed products: columns in order of their expert, and the jobs that they make.
struct JobTable {
  int n_jobs;
  uint32_t jobs[kMaxRoutedPairs];  // expert << 16 | first << 6 | count - 1
  int16_t rows[kMaxRoutedPairs];   // result rows; ~row: its id is no expert
};
static_assert(kMaxRoutedPairs <= 1 << 10 && kMaxSmallRows <= 1 << 6 &&
              kMaxRoutedExperts <= 1 << 16);

// Where the columns of a tile go, once it is whole.
struct TileEnd {
  bool last;                             // the block is the last to add to it
  float* out[kMaxSmallRows];             // result rows
  const std::byte* more[kMaxSmallRows];  // of the residual, or of what is multiplied; null: none
  float scale[kMaxSmallRows];
};

namespace small_batch {

// One warp. counts[e] pairs are expert e's; the first of them goes to firsts[e].
__device__ __forceinline__ void number_jobs(int n_experts, int columns, const int* counts,
                                            int* firsts, JobTable& table) {
  int first = 0, n_jobs = 0;
  for (int begin = 0; begin < n_experts; begin += kWarpThreads) {
    const int e = begin + lane_id();
    const int count = e < n_experts ? counts[e] : 0;
    const int n_tiles = (count + columns - 1) / columns;
    const int both = count << 16 | n_tiles;
    int sum = both;
    for (int step = 1; step < kWarpThreads; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, sum, step);
      if (lane_id() >= step) sum += before;
    }
    const int own_first = first + ((sum - both) >> 16), own_job = n_jobs + ((sum - both) & 0xffff);
    if (e < n_experts) firsts[e] = own_first;
    for (int i = 0; i < n_tiles; ++i) {
      const int at = own_first + i * columns, n = min(columns, count - i * columns);
      table.jobs[own_job + i] = static_cast<uint32_t>(e << 16 | at << 6 | (n - 1));
    }
    const int total = __shfl_sync(kAllLanes, sum, kWarpThreads - 1);
    first += total >> 16;
    n_jobs += total & 0xffff;
  }
  if (lane_id() == 0) table.n_jobs = n_jobs;
}

// Of a routed product, by all threads; ids that are no expert are those of the first. Uses dynamic
// shared memory: ids, counts, firsts.
__device__ __forceinline__ void find_jobs(const Product& p, int columns, JobTable& table) {
  constexpr int kTurns = kMaxRoutedPairs / small_batch_threads(1);
  int* ids = dynamic_smem<int>();
  int* counts = ids + kMaxRoutedPairs;
  int* firsts = counts + p.n_experts;
  const int n_pairs = p.extent[1] * p.extent[2], n_threads = static_cast<int>(blockDim.x);
  for (int e = static_cast<int>(threadIdx.x); e < p.n_experts; e += n_threads) counts[e] = 0;
  __syncthreads();
  int expert[kTurns] = {}, place[kTurns] = {};
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int pair = static_cast<int>(threadIdx.x) + i * n_threads;
    if (pair >= n_pairs) break;
    expert[i] = expert_of(p, pair);
    ids[pair] = max(expert[i], 0);
    atomicAdd(&counts[max(expert[i], 0)], 1);
  }
  __syncthreads();
  if (warp_id() == 0) number_jobs(p.n_experts, columns, counts, firsts, table);
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int pair = static_cast<int>(threadIdx.x) + i * n_threads;
    if (pair >= n_pairs) break;
#pragma unroll 8
    for (int before = 0; before < pair; ++before) place[i] += ids[before] == max(expert[i], 0);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int pair = static_cast<int>(threadIdx.x) + i * n_threads;
    if (pair >= n_pairs) break;
    const int at = firsts[max(expert[i], 0)] + place[i];
    table.rows[at] = static_cast<int16_t>(expert[i] < 0 ? ~pair : pair);
  }
  __syncthreads();
}

__device__ __forceinline__ Job job_at(const SmallBatch& b, int columns, const JobTable& table,
                                      int index) {
  if (b.product.routed) {
    const uint32_t job = table.jobs[index];
    return {static_cast<int>(job >> 16), static_cast<int>(job >> 6 & 1023u),
            static_cast<int>(job & 63u) + 1};
  }
  const int matrix = index / b.column_tiles, first = (index - matrix * b.column_tiles) * columns;
  return {matrix, first, min(columns, b.rows_per_matrix - first)};
}

// The row of x, as staged, of a job's column.
__device__ __forceinline__ int x_row_of(const SmallBatch& b, const JobTable& table, const Job& job,
                                        int column) {
  if (b.product.routed) {
    const int row = table.rows[job.first + column], pair = row < 0 ? ~row : row;
    return b.product.slots_share_x() ? pair / b.product.extent[2] : pair;
  }
  return job.matrix * b.rows_per_matrix + job.first + column;
}

// The result row, or ~row where it is to be NaN.
__device__ __forceinline__ int result_row_of(const SmallBatch& b, const JobTable& table,
                                             const Job& job, int column) {
  if (b.product.routed) return table.rows[job.first + column];
  return row_of_matrix(b.product, job.matrix, job.first + column);
}

// ---- shares of blocks ---------------------------------------------------------------------------

struct Work {
  int n_steps;   // in all
  int n_blocks;  // that have any
};

__device__ __forceinline__ Work work_of(const SmallBatch& b, int n_jobs) {
  const int n = n_jobs * b.tiles_per_job * b.n_steps;
  return {n, min(n, static_cast<int>(gridDim.x))};
}
__device__ __forceinline__ int first_step(const Work& work, int block) {
  return static_cast<int>(static_cast<unsigned>(work.n_steps * block) /
                          static_cast<unsigned>(work.n_blocks));
}
// The block b with first_step(b) <= step < first_step(b + 1).
__device__ __forceinline__ int block_of_step(const Work& work, int step) {
  return static_cast<int>(static_cast<unsigned>((step + 1) * work.n_blocks - 1) /
                          static_cast<unsigned>(work.n_steps));
}

// ---- results ------------------------------------------------------------------------------------

// Adds what the blocks first .. last have of a tile, this one among them; false but for the block
// that comes last, which gets all. A block has two places: for a tile that it begins, and for one
// begun before.
template <int NT>
__device__ __forceinline__ bool add_parts(const SmallBatch& b, bool& shared_last, int first,
                                          int last, float (&sums)[NT][4]) {
  constexpr int n_threads = small_batch_threads(NT);
  float4* parts = reinterpret_cast<float4*>(b.parts) + threadIdx.x;
  const auto place = [&](int block) {
    return parts + (2 * block + (block == first ? 1 : 0)) * (NT * n_threads);
  };
  float4* own = place(static_cast<int>(blockIdx.x));
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    own[nt * n_threads] = make_float4(sums[nt][0], sums[nt][1], sums[nt][2], sums[nt][3]);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared_last = atomicAdd(&b.counters[first], 1) == last - first;
  __syncthreads();
  if (!shared_last) return false;
  __threadfence();
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    for (int i = 0; i < 4; ++i) sums[nt][i] = 0.0f;
  }
#pragma unroll 1
  for (int block = first; block <= last; ++block) {
    const float4* from = place(block);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const float4 v = load_coherent(from + nt * n_threads);
      sums[nt][0] += v.x;
      sums[nt][1] += v.y;
      sums[nt][2] += v.z;
      sums[nt][3] += v.w;
    }
  }
  return true;
}

// One column each of a job's threads; a barrier follows.
__device__ __forceinline__ void find_columns(const SmallBatch& b, const JobTable& table,
                                             const Job& job, TileEnd& end) {
  const Product& p = b.product;
  const int column = static_cast<int>(threadIdx.x);
  if (column >= job.count) return;
  const int signed_row = result_row_of(b, table, job, column);
  const int row = signed_row < 0 ? ~signed_row : signed_row;
  float* out = p.out + static_cast<int64_t>(row) * p.n;
  const GridIndex i = grid_index(p, row);
  end.out[column] = out;
  end.more[column] = nullptr;
  if (b.finish == Finish::multiply) {
    end.more[column] = reinterpret_cast<const std::byte*>(out);
  } else if (p.has_residual) {
    end.more[column] = p.residual + i.i0 * p.residual_stride[0] + i.i1 * p.residual_stride[1] +
                       i.i2 * p.residual_stride[2];
  }
  end.scale[column] = signed_row < 0 ? NAN : b.scales[x_row_of(b, table, job, column)];
}

// A warp's rows n and n + 8 of a tile, n that of the lane, or gate and up of row n. All that is
// read is asked for before any of it is used.
template <int NT>
__device__ __forceinline__ void store_tile(const SmallBatch& b, const TileEnd& end, int n_columns,
                                           int n, const float (&sums)[NT][4]) {
  const Product& p = b.product;
  const bool multiplies = b.finish == Finish::multiply;
  const int64_t step = multiplies ? int64_t{sizeof(float)} : p.residual_step;
  const int first = 2 * (lane_id() % 4);
  float more[NT][4] = {};
  if (multiplies || p.has_residual) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * nt + first + i % 2, row = n + i / 2 * 8;
        if (column >= n_columns || row >= p.n || (p.swiglu && i >= 2)) continue;
        more[nt][i] = *reinterpret_cast<const float*>(end.more[column] + row * step);
      }
    }
  }
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * nt + first + i % 2, row = n + i / 2 * 8;
      if (column >= n_columns || row >= p.n || (p.swiglu && i >= 2)) continue;
      const float scale = end.scale[column];
      float value = scale * sums[nt][i];
      if (p.swiglu) value = silu_exact(value) * (scale * sums[nt][(i + 2) % 4]);
      end.out[column][row] = multiplies ? silu_exact(more[nt][i]) * value : value + more[nt][i];
    }
  }
}

}  // namespace small_batch

}  // namespace mla::cuda
