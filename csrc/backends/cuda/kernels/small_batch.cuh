// Products of a few rows of x, 1 to 64 per matrix, with weights streamed once at full bandwidth.
//
//   out[r][n] = scale[r] * sum_k w[n][k] x'[r][k]     x = scale * x', see staged_rows.cuh
//
// Shapes and cases: product.h. Weights are operand A (16 rows of w) of m16n8k16, rows of x are its
// columns, NT tiles of 8; see fragments.cuh for weights and their arithmetic.
//
// A block has 8 warps and a range of rows of one matrix (a job: a matrix, a routed pair, an expert
// with all rows routed to it, or all experts of a token in turn), which it goes through in tiles of
// 16 rows for each strip of warps. The `split` warps of a strip divide k, unit by unit, and add
// their sums in shared memory in a fixed order, which depends on k alone: a row has the same bits
// whatever rows come with it. Each warp streams its units through a ring of stages of its own by
// asynchronous copies, over tiles and matrices without a break; the first of them are started
// before the kernel before has ended.
//
// Ring: 4.3 TB/s times 0.8 us of latency are 26 KB per multiprocessor of 132. Two blocks with at
// least one stage of 2 to 4 KB under way for each of 8 warps have 37 to 61 KB.
// Error: x is rounded to f16 (2^-12); products are exact and sums float32.
#pragma once

#include "backends/cuda/kernels/fragments_small.cuh"
#include "backends/cuda/kernels/fragments_super.cuh"
#include "backends/cuda/product_kernels.h"

namespace mla::cuda {

template <Format F>
inline constexpr int kStages = stages_of(StageLayout<F>::kBytes, MLA_CUDA_ARCH / 10);

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

// ---- streams of weights -------------------------------------------------------------------------

template <Format F>
struct WeightStream {
  const SmallBatch& b;
  const JobState& state;
  int job;
  int row_begin, row_end, n_tiles, n_strips, slice, strip;
  Planes planes;
  std::byte* ring;
  // The next unit to be copied, and its stage.
  int tile = 0, segment = 0, unit = 0, stage = 0;

  __device__ __forceinline__ WeightStream(const SmallBatch& batch, const JobState& job_state)
      : b(batch), state(job_state), planes(planes_of<F>(batch.product.k)) {
    const int n = b.product.n;
    job = static_cast<int>(blockIdx.x) / b.blocks_per_job;
    row_begin = static_cast<int>(blockIdx.x) % b.blocks_per_job * b.rows_per_block;
    row_end = min(row_begin + b.rows_per_block, n);
    n_strips = kSmallBatchWarps / b.split;
    n_tiles = (row_end - row_begin + kTileRows * n_strips - 1) / (kTileRows * n_strips);
    slice = warp_id() % b.split;
    strip = warp_id() / b.split;
    ring = dynamic_smem() + warp_id() * kStages<F> *
                                StageLayout<F>::kBytes;
    restart();
  }

  __device__ __forceinline__ void restart() {
    tile = slice < b.n_units ? 0 : n_tiles;
    segment = 0;
    unit = slice;
    stage = 0;
  }

  __device__ __forceinline__ const std::byte* matrix(int of_segment) const {
    const Product& p = b.product;
    const Weight& w = p.swiglu && of_segment == 1 ? p.up : p.w;
    switch (b.jobs) {
      case Jobs::matrices:
        return matrix_of(p, w, job);
      case Jobs::experts:
        return expert_matrix(w, job);
      case Jobs::sums:
        return expert_matrix(w, state.experts[of_segment]);
      default:
        return expert_matrix(w, state.experts[0]);
    }
  }

  __device__ __forceinline__ int first_row(int of_tile) const {
    return row_begin + (of_tile * n_strips + strip) * kTileRows;
  }

  // Starts the copy of the next unit, if there is one; counts as a group of copies in any case.
  __device__ __forceinline__ void copy_next() {
    if (tile < n_tiles) {
      const int64_t stride = segment == 1 && b.product.swiglu ? b.product.up.row_stride
                                                              : b.product.w.row_stride;
      const int row = first_row(tile);
      copy_unit<F>(ring + stage * StageLayout<F>::kBytes, matrix(segment) + row * stride, stride,
                   row_end - row, unit, planes);
      advance();
    }
    cp_async_commit();
  }

 private:
  __device__ __forceinline__ void advance() {
    stage = stage + 1 == kStages<F> ? 0 : stage + 1;
    unit += b.split;
    if (unit < b.n_units) return;
    unit = slice;
    if (++segment < b.n_segments) return;
    segment = 0;
    ++tile;
  }
};

// ---- arithmetic ---------------------------------------------------------------------------------

// Where a lane finds its column of each tile of staged rows, and how many rows there are.
template <int NT>
struct Columns {
  const std::byte* base;
  uint32_t offset[NT];  // this lane's 16 bytes of a group included
  int n_rows;
  __device__ __forceinline__ bool any(int tile) const { return NT == 1 || 8 * tile < n_rows; }
};

template <Format F>
__device__ __forceinline__ void product_of_group(float (&d)[4], const uint32_t (&a)[4],
                                                 uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (F == Format::BF16) {
    mma_bf16(d, a, b);
  } else {
    mma_f16(d, a, b);
  }
}

__device__ __forceinline__ void add_scaled(float (&sum)[4], const float (&d)[4], float low,
                                           float high) {
  sum[0] = fmaf(low, d[0], sum[0]);
  sum[1] = fmaf(low, d[1], sum[1]);
  sum[2] = fmaf(high, d[2], sum[2]);
  sum[3] = fmaf(high, d[3], sum[3]);
}

// sums += the products of a group of 32, a0 and a1, with its 16 bytes of x.
template <Format F>
__device__ __forceinline__ void add_group(float (&sums)[4], const uint32_t (&a0)[4],
                                          const uint32_t (&a1)[4], const float (&scale)[2][2],
                                          const uint4& x) {
  constexpr int kScales = Fragments<F>::kScales;
  if constexpr (kScales == 0) {
    product_of_group<F>(sums, a0, x.x, x.y);
    product_of_group<F>(sums, a1, x.z, x.w);
  } else {
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    product_of_group<F>(d, a0, x.x, x.y);
    if constexpr (kScales == 2) {
      add_scaled(sums, d, scale[0][0], scale[0][1]);
      d[0] = d[1] = d[2] = d[3] = 0.0f;
    }
    product_of_group<F>(d, a1, x.z, x.w);
    add_scaled(sums, d, scale[kScales - 1][0], scale[kScales - 1][1]);
  }
}

template <Format F, int NT, int i>
__device__ __forceinline__ void add_pair(const Fragments<F>& weights, const Columns<NT>& x,
                                         uint32_t unit_at, float (&sums)[NT][4]) {
  PairFragments f;
  weights.template pair<i>(f);
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    if (!x.any(nt)) continue;
    const std::byte* at = x.base + (x.offset[nt] + unit_at);
    const uint4 first = *reinterpret_cast<const uint4*>(at + 64 * Fragments<F>::first(i));
    const uint4 second = *reinterpret_cast<const uint4*>(at + 64 * Fragments<F>::second(i));
    add_group<F>(sums[nt], f.a[0], f.a[1], f.scale[0], first);
    add_group<F>(sums[nt], f.a[2], f.a[3], f.scale[1], second);
  }
}

// What the minima of a unit add: their fragments times the sums of x, high and low halves at once.
template <Format F, int NT>
__device__ __forceinline__ void add_minima(const Fragments<F>& weights, const Columns<NT>& x,
                                           uint32_t sums_at, float (&sums)[NT][4]) {
  constexpr int n = Fragments<F>::kMinima;
  uint32_t a[2][4];
  weights.template minimum_fragment<0>(a[0]);
  if constexpr (n == 2) weights.template minimum_fragment<1>(a[1]);
  const uint32_t own = static_cast<uint32_t>(lane_id() % 4);
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    if (!x.any(nt)) continue;
    const std::byte* at = x.base + (x.offset[nt] - 16 * own + sums_at + 8 * n * own);
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const uint2 v = reinterpret_cast<const uint2*>(at)[j];
      product_of_group<F>(d, a[j], v.x, v.y);
    }
    add_scaled(sums[nt], d, weights.minimum_scale(0), weights.minimum_scale(1));
  }
}

template <Format F, int NT, int... i>
__device__ __forceinline__ void add_unit(const std::byte* stage, int unit, const SmallBatch& b,
                                         const Columns<NT>& x, float (&sums)[NT][4],
                                         std::integer_sequence<int, i...>) {
  const Fragments<F> weights(stage, unit);
  const uint32_t unit_at = static_cast<uint32_t>(unit) * (2 * kUnit<F>);
  (add_pair<F, NT, i>(weights, x, unit_at, sums), ...);
  if constexpr (Fragments<F>::kMinima > 0) {
    const int at = staged_units(b.product.k) * 2 * kStagedUnit;
    add_minima<F>(weights, x,
                  static_cast<uint32_t>(at + unit * sums_bytes(Fragments<F>::kRows)), sums);
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

// ---- the kernel's parts -------------------------------------------------------------------------

// Rows first .. first + n_rows of the job, as fragments find them: staged here or by a kernel
// before. Returns where they lie; state.scales holds their scales, and factors those of the slots.
template <Format F>
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
  staged::stage_rows<Fragments<F>::kRows>(
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
    const int row = b.staged == nullptr ? column
                                        : staged_row(b, valid_row(state.rows[first + column]));
    x.offset[nt] = static_cast<uint32_t>(row) * static_cast<uint32_t>(b.pitch) +
                   16u * static_cast<uint32_t>(lane_id() % 4);
  }
}

}  // namespace small_batch

template <Format F, int NT>
__global__ void __launch_bounds__(kSmallBatchThreads, NT <= 4 ? 2 : 1)
    small_batch_kernel(SmallBatch b) {
  using namespace small_batch;
  constexpr int n_stages = kStages<F>;
  constexpr auto kPairs = std::make_integer_sequence<int, kUnit<F> / 64>();
  __shared__ JobState state;
  pdl_trigger();
  WeightStream<F> stream(b, state);
  if (!b.product.routed) {
    for (int i = 0; i < n_stages - 1; ++i) stream.copy_next();
  }
  pdl_wait();
  const int n_found = find_rows(b, stream.job, state);
  float4* parts = reinterpret_cast<float4*>(dynamic_smem() + b.parts_at);

  for (int first = 0; first < n_found; first += 8 * NT) {
    Columns<NT> x;
    x.n_rows = min(n_found - first, 8 * NT);
    if (b.product.routed) {
      stream.restart();
      for (int i = 0; i < n_stages - 1; ++i) stream.copy_next();
    }
    x.base = stage_job<F>(b, first, x.n_rows, state);
    place_columns(b, state, first, x);
    const uint32_t slot_pitch = b.jobs == Jobs::sums && !b.product.slots_share_x() ? b.pitch : 0;

    int stage = 0;
    for (int tile = 0; tile < stream.n_tiles; ++tile) {
      float totals[4] = {};
      for (int segment = 0; segment < b.n_segments; ++segment) {
        float sums[NT][4] = {};
        for (int unit = stream.slice; unit < b.n_units; unit += b.split) {
          cp_async_wait<n_stages - 2>();
          __syncwarp();
          stream.copy_next();
          add_unit<F, NT>(stream.ring + stage * StageLayout<F>::kBytes, unit, b, x, sums, kPairs);
          stage = stage + 1 == n_stages ? 0 : stage + 1;
        }
        float4* part = parts + ((b.product.swiglu ? segment : 0) * kSmallBatchWarps + warp_id()) *
                                   NT * kWarpThreads;
        if (NT == 1 && b.jobs == Jobs::sums) {  // sums have one row
          add_scaled(totals, sums[0], state.factors[segment], state.factors[segment]);
          x.offset[0] += slot_pitch;
          for (int i = 0; i < 4; ++i) sums[0][i] = totals[i];
        }
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          part[nt * kWarpThreads + lane_id()] =
              make_float4(sums[nt][0], sums[nt][1], sums[nt][2], sums[nt][3]);
        }
      }
      x.offset[0] -= slot_pitch * b.n_segments;
      __syncthreads();
      finish_tile<NT>(b, state, parts, first, x.n_rows, tile, stream.row_begin, stream.row_end);
      __syncthreads();
    }
  }
  cp_async_wait<0>();
}

template <Format F>
constexpr void add_small_batch_kernels(ProductKernels& kernels) {
  kernels.small_batch[0] = small_batch_kernel<F, 1>;
  kernels.small_batch[1] = small_batch_kernel<F, 2>;
  kernels.small_batch[2] = small_batch_kernel<F, 4>;
  kernels.small_batch[3] = small_batch_kernel<F, 8>;
  kernels.stage_rows = stage_kernel<Fragments<F>::kRows>;
  kernels.layout = Fragments<F>::kRows;
  kernels.stage_bytes = StageLayout<F>::kBytes;
  kernels.unit = kUnit<F>;
}

}  // namespace mla::cuda
