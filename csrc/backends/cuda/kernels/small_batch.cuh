// Products of a few rows of x, 1 to 64 per matrix, with weights streamed once at full bandwidth.
//
//   out[r][n] = scale[r] * sum_k w[n][k] x'[r][k]     x = scale * x', see staged_rows.cuh
//
// Shapes and cases: product.h; jobs and who does them: small_batch_job.cuh. Weights are operand A
// (16 rows of w) of m16n8k16, rows of x are its columns, NT tiles of 8; see fragments.cuh for
// weights and their arithmetic. For a swiglu, eight of the 16 are of gate and eight of up, so that
// a lane has both of a result.
//
// A tile is 16 rows of w for each warp of a block, which goes through it in steps of one or two
// units of k. Asynchronous copies bring weights and x into a ring of stages, on over tiles and jobs
// without a break: each warp its own weights, and all together the x that they share, so that they
// meet once a step. A kernel before has converted x; meanwhile the first weights come as far as L2.
//
// Rings: 4.3 TB/s times 0.8 us of latency are 26 KB per multiprocessor of 132; 16 warps have 37 to
// 74 KB of weights under way.
// Shared memory: a warp reads 512 bytes of x for each 512 weights and tile of columns, in four
// cycles; 4.3 TB/s bring 512 weights of 4.5 bits to a multiprocessor in 16. Beyond four tiles these
// reads, and no more the bytes of the weights, set the time.
// Error: x is rounded to f16 (2^-12); products are exact and sums float32. Beyond 16 columns
// weights are f16 with their scale, which is rounded to f16 too.
#pragma once

#include <utility>

#include "backends/cuda/kernels/fragments_small.cuh"
#include "backends/cuda/kernels/fragments_super.cuh"
#include "backends/cuda/kernels/small_batch_job.cuh"

namespace mla::cuda {

namespace small_batch {

// Staged numbers and sums of a unit, of one row of x.
template <Format F>
inline constexpr int kXBytes = 2 * kUnit<F> + sums_bytes(Fragments<F>::kRows);
// From column to column in shared memory: an odd multiple of 64, so that the two columns which
// eight lanes read 64 bytes of lie in different banks.
template <Format F>
inline constexpr int kXPitch = kXBytes<F> / 128 * 128 + 64 + (kXBytes<F> % 128 > 64 ? 128 : 0);
static_assert(kXBytes<Format::Q4_K> <= kXPitch<Format::Q4_K>);

template <Format F, int NT>
inline constexpr Steps kSteps = steps_of(StageLayout<F>::kBytes, kXPitch<F>, NT,
                                         MLA_CUDA_ARCH / 10);

// A stage: units of weights of each warp, then units of x, column by column.
template <Format F, int NT>
struct Stage {
  static constexpr int kUnits = kSteps<F, NT>.units, kStages = kSteps<F, NT>.stages;
  static constexpr int kWarpBytes = kUnits * StageLayout<F>::kBytes;
  static constexpr int kXAt = small_batch_warps(NT) * kWarpBytes;
  static constexpr int kXUnit = 8 * NT * kXPitch<F>;
  static constexpr int kBytes = kXAt + kUnits * kXUnit;

  __device__ __forceinline__ static std::byte* at(int stage) {
    return dynamic_smem() + stage * kBytes;
  }
};

// Scales meet the sums of their group, or, with many columns, the weights: a group has 16 weights a
// lane and 4 sums for each tile of columns.
template <Format F, int NT>
inline constexpr bool kScaledFirst = NT >= 4 && Fragments<F>::kScales > 0;
template <Format F>
inline constexpr bool kSubnormals = Fragments<F>::kResultScale == fragments::kSubnormal;

// Weights that a warp asks for before the kernels ahead have ended: units.
inline constexpr int kFetchedUnits = 4;

// The first of a warp's rows of a tile; of gate and up for a swiglu.
template <int NT>
__device__ __forceinline__ int first_row(const SmallBatch& b, int tile_of_job) {
  const int strip = tile_of_job * small_batch_warps(NT) + warp_id();
  return strip * (b.product.swiglu ? kTileRows / 2 : kTileRows);
}

// ---- copies -------------------------------------------------------------------------------------

// Where a block is in its run of steps.
struct Place {
  int left;  // of them
  int tile, unit;
  int stage;
};

template <Format F, int NT>
__device__ __forceinline__ Place first_place(const SmallBatch& b, const Work& work) {
  const int block = static_cast<int>(blockIdx.x);
  if (block >= work.n_blocks) return {};
  const int begin = first_step(work, block), end = first_step(work, block + 1);
  const int tile = begin / b.n_steps;
  return {end - begin, tile, (begin - tile * b.n_steps) * Stage<F, NT>::kUnits, 0};
}

// Whether the next step is of another tile.
template <Format F, int NT>
__device__ __forceinline__ bool next_step(const SmallBatch& b, Place& place) {
  place.stage = place.stage + 1 == Stage<F, NT>::kStages ? 0 : place.stage + 1;
  --place.left;
  place.unit += Stage<F, NT>::kUnits;
  if (place.unit < b.n_units) return false;
  place.unit = 0;
  ++place.tile;
  return true;
}

// The copies that a warp makes, ahead of what it multiplies.
template <Format F, int NT>
struct Copies {
  static constexpr int kWarps = small_batch_warps(NT), kColumns = 8 * NT / kWarps;
  Place place;  // of the next
  TileRows rows;
  int x_at[kColumns];  // of columns warp + i * kWarps; -1: none

  // Begins a tile.
  __device__ __forceinline__ void locate(const SmallBatch& b, const JobTable& table) {
    const Product& p = b.product;
    const int index = place.tile / b.tiles_per_job;
    const Job job = job_at(b, 8 * NT, table, index);
    const int first = first_row<NT>(b, place.tile - index * b.tiles_per_job);
    const int64_t at = first * p.w.row_stride;
    rows.stride = static_cast<int>(p.w.row_stride);
    rows.low = matrix(p, p.w, job) + at;
    rows.n_low = p.n - first;
    rows.high = p.swiglu ? matrix(p, p.up, job) + at : rows.low + 8 * rows.stride;
    rows.n_high = p.swiglu ? rows.n_low : rows.n_low - 8;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = warp_id() + i * kWarps;
      x_at[i] = column < job.count ? x_row_of(b, table, job, column) * b.pitch : -1;
    }
  }

  __device__ __forceinline__ void copy(const SmallBatch& b) const {
    std::byte* stage = Stage<F, NT>::at(place.stage);
    std::byte* to = stage + warp_id() * Stage<F, NT>::kWarpBytes;
    copy_units<F, Stage<F, NT>::kUnits>(to, rows, place.unit, b.n_units, b.planes);
    stage += Stage<F, NT>::kXAt + warp_id() * kXPitch<F>;
#pragma unroll
    for (int u = 0; u < Stage<F, NT>::kUnits; ++u) {
      if (place.unit + u < b.n_units) copy_x(b, stage + u * Stage<F, NT>::kXUnit, place.unit + u);
    }
  }

 private:
  __device__ __forceinline__ const std::byte* matrix(const Product& p, const Weight& w,
                                                     const Job& job) const {
    return p.routed ? expert_matrix(w, job.matrix) : matrix_of(p, w, job.matrix);
  }

  __device__ __forceinline__ void copy_x(const SmallBatch& b, std::byte* to, int unit) const {
    constexpr int kPieces = kXBytes<F> / 16;
    const std::byte* from = b.staged + (unit * kXBytes<F> + 16 * lane_id());
    to += 16 * lane_id();
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const std::byte* row = from + max(x_at[i], 0);
      std::byte* column = to + i * kWarps * kXPitch<F>;
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += kWarpThreads) {
        if (lane_id() < kPieces - piece) {
          cp_async16(column + 16 * piece, row + 16 * piece, x_at[i] >= 0);
        }
      }
    }
  }
};

// ---- arithmetic ---------------------------------------------------------------------------------

template <Format F>
__device__ __forceinline__ void product_of_group(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (F == Format::BF16) {
    mma_bf16(d, a, b);
  } else {
    mma_f16(d, a, b);
  }
}

__device__ __forceinline__ void add_scaled(float (&sum)[4], const float (&d)[4],
                                           const float (&scale)[2]) {
  sum[0] = fmaf(scale[0], d[0], sum[0]);
  sum[1] = fmaf(scale[0], d[1], sum[1]);
  sum[2] = fmaf(scale[1], d[2], sum[2]);
  sum[3] = fmaf(scale[1], d[3], sum[3]);
}

// sums += the products of two groups of 32 with 16 bytes of x each. Products that wait for each
// other stand apart.
template <Format F>
__device__ __forceinline__ void add_groups(float (&sums)[4], const PairFragments& f,
                                           const uint4& first, const uint4& second) {
  constexpr int kScales = Fragments<F>::kScales;
  float d[2 * kScales][4] = {};
  product_of_group<F>(d[0], f.a[0], first.x, first.y);
  product_of_group<F>(d[kScales], f.a[2], second.x, second.y);
  product_of_group<F>(d[kScales - 1], f.a[1], first.z, first.w);
  product_of_group<F>(d[2 * kScales - 1], f.a[3], second.z, second.w);
#pragma unroll
  for (int i = 0; i < 2 * kScales; ++i) {
    add_scaled(sums, d[i], f.scale[i / kScales][i % kScales]);
  }
}

// A lane's x of a unit: column g of each tile.
template <Format F, int NT>
struct Columns {
  const std::byte* at;
  __device__ __forceinline__ const std::byte* tile(int nt) const {
    return at + nt * 8 * kXPitch<F>;
  }
};

// sums += the products of a group of 32, for all columns. Four tiles at a time: as many products do
// not wait for each other.
template <Format F, int NT>
__device__ __forceinline__ void add_plain(const uint32_t (&a0)[4], const uint32_t (&a1)[4],
                                          const Columns<F, NT>& x, int group,
                                          float (&sums)[NT][4]) {
  constexpr int n = NT < 4 ? NT : 4;
#pragma unroll
  for (int first = 0; first < NT; first += n) {
    uint4 v[n];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      v[i] = *reinterpret_cast<const uint4*>(x.tile(first + i) + 64 * group + 16 * (lane_id() % 4));
    }
#pragma unroll
    for (int i = 0; i < n; ++i) product_of_group<F>(sums[first + i], a0, v[i].x, v[i].y);
#pragma unroll
    for (int i = 0; i < n; ++i) product_of_group<F>(sums[first + i], a1, v[i].z, v[i].w);
  }
}

template <Format F, int NT, int i>
__device__ __forceinline__ void add_pair(const Fragments<F>& weights, const Columns<F, NT>& x,
                                         float (&sums)[NT][4]) {
  PairFragments f;
  weights.template pair<i>(f);
  if constexpr (kScaledFirst<F, NT>) {
    fragments::apply_scales<Fragments<F>::kScales, kSubnormals<F>>(f);
  }
  if constexpr (kScaledFirst<F, NT> || Fragments<F>::kScales == 0) {
    add_plain<F, NT>(f.a[0], f.a[1], x, Fragments<F>::first(i), sums);
    add_plain<F, NT>(f.a[2], f.a[3], x, Fragments<F>::second(i), sums);
  } else {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const std::byte* at = x.tile(nt) + 16 * (lane_id() % 4);
      const uint4 first = *reinterpret_cast<const uint4*>(at + 64 * Fragments<F>::first(i));
      const uint4 second = *reinterpret_cast<const uint4*>(at + 64 * Fragments<F>::second(i));
      add_groups<F>(sums[nt], f, first, second);
    }
  }
}

// What the minima of a unit add: their fragments times the sums of x, high and low halves at once.
template <Format F, int NT>
__device__ __forceinline__ void add_minima(const Fragments<F>& weights, const Columns<F, NT>& x,
                                           float (&sums)[NT][4]) {
  constexpr int n = Fragments<F>::kMinima;
  uint32_t a[2][4];
  weights.template minimum_fragment<0>(a[0]);
  if constexpr (n == 2) weights.template minimum_fragment<1>(a[1]);
  constexpr float units = kScaledFirst<F, NT> ? Fragments<F>::kResultScale : 1.0f;
  const float scale[2] = {units * weights.minimum_scale(0), units * weights.minimum_scale(1)};
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    const std::byte* at = x.tile(nt) + (2 * kUnit<F> + 8 * n * (lane_id() % 4));
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const uint2 v = reinterpret_cast<const uint2*>(at)[j];
      product_of_group<F>(d, a[j], v.x, v.y);
    }
    add_scaled(sums[nt], d, scale);
  }
}

template <Format F, int NT, int... i>
__device__ __forceinline__ void add_unit(const std::byte* stage, int unit, const Columns<F, NT>& x,
                                         float (&sums)[NT][4], std::integer_sequence<int, i...>) {
  const Fragments<F> weights(stage, unit);
  (add_pair<F, NT, i>(weights, x, sums), ...);
  if constexpr (Fragments<F>::kMinima > 0) add_minima<F, NT>(weights, x, sums);
}

template <Format F, int NT>
__device__ __forceinline__ void add_step(const SmallBatch& b, const Place& place,
                                         float (&sums)[NT][4]) {
  using Layout = Stage<F, NT>;
  constexpr auto kPairs = std::make_integer_sequence<int, kUnit<F> / 64>();
  const std::byte* stage = Layout::at(place.stage);
  const std::byte* weights = stage + warp_id() * Layout::kWarpBytes;
  Columns<F, NT> x = {stage + (Layout::kXAt + lane_id() / 4 * kXPitch<F>)};
  const int end = min(place.unit + Layout::kUnits, b.n_units);
#pragma unroll 1
  for (int unit = place.unit; unit < end; ++unit) {
    add_unit<F, NT>(weights, unit, x, sums, kPairs);
    weights += StageLayout<F>::kBytes;
    x.at += Layout::kXUnit;
  }
}

// Leaves sums of nothing.
template <Format F, int NT>
__device__ __forceinline__ void end_tile(const SmallBatch& b, const JobTable& table, TileEnd& end,
                                         const Work& work, int tile, float (&sums)[NT][4]) {
  const int index = tile / b.tiles_per_job;
  const Job job = job_at(b, 8 * NT, table, index);
  find_columns(b, table, job, end);
  const int first = block_of_step(work, tile * b.n_steps);
  const int last = block_of_step(work, (tile + 1) * b.n_steps - 1);
  float scaled[NT][4];
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    constexpr float scale = kScaledFirst<F, NT> ? 1.0f : Fragments<F>::kResultScale;
    for (int i = 0; i < 4; ++i) {
      scaled[nt][i] = scale * sums[nt][i];
      sums[nt][i] = 0.0f;
    }
  }
  if (first == last) {
    __syncthreads();
  } else if (!add_parts<NT>(b, end.last, first, last, scaled)) {
    return;
  }
  const int row = first_row<NT>(b, tile - index * b.tiles_per_job) + lane_id() / 4;
  store_tile<NT>(b, end, job.count, row, scaled);
}

}  // namespace small_batch

template <Format F, int NT>
__global__ void __launch_bounds__(small_batch_threads(NT), small_batch_blocks(NT))
    small_batch_kernel(const __grid_constant__ SmallBatch b) {
  using namespace small_batch;
  __shared__ JobTable table;
  __shared__ TileEnd tile_end;
  Copies<F, NT> copies = {};
  Work work = work_of(b, b.n_jobs);
  copies.place = first_place<F, NT>(b, work);
  bool begins = true;
  if (!b.product.routed && copies.place.left > 0) {
    copies.locate(b, table);
    fetch_units<F>(copies.rows, copies.place.unit, kFetchedUnits, b.planes);
  }
  pdl_wait();
  if (b.product.routed) {
    find_jobs(b.product, 8 * NT, table);
    work = work_of(b, table.n_jobs);
    copies.place = first_place<F, NT>(b, work);
  }
  Place place = copies.place;
  float sums[NT][4] = {};
  int lead = Stage<F, NT>::kStages - 1;  // steps that are only copied
#pragma unroll 1
  while (place.left > 0) {
    if (copies.place.left > 0) {
      if (begins) copies.locate(b, table);
      copies.copy(b);
      begins = next_step<F, NT>(b, copies.place);
    }
    cp_async_commit();
    if (--lead < 0) {
      add_step<F, NT>(b, place, sums);
      const int tile = place.tile;
      const bool ends = next_step<F, NT>(b, place);
      if (ends || place.left == 0) end_tile<F, NT>(b, table, tile_end, work, tile, sums);
    } else if (lead > 0) {
      continue;
    }
    cp_async_wait<Stage<F, NT>::kStages - 2>();
    __syncthreads();
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
  kernels.w_unit_bytes = StageLayout<F>::kBytes;
  kernels.unit = kUnit<F>;
  kernels.x_unit_bytes = small_batch::kXPitch<F>;
}

}  // namespace mla::cuda
