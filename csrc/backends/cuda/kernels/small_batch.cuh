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
#include "backends/cuda/kernels/small_batch_job.cuh"

namespace mla::cuda {

template <Format F>
inline constexpr int kStages = stages_of(StageLayout<F>::kBytes, MLA_CUDA_ARCH / 10);

namespace small_batch {

// ---- streams of weights -------------------------------------------------------------------------

template <Format F>
struct WeightStream {
  const SmallBatch& b;
  const JobState& state;
  int job;
  int row_begin, row_end, n_tiles, n_strips, slice, strip;
  Planes planes;
  std::byte* ring;

  __device__ __forceinline__ WeightStream(const SmallBatch& batch, const JobState& job_state)
      : b(batch), state(job_state), planes(planes_of<F>(batch.product.k)) {
    job = static_cast<int>(blockIdx.x) / b.blocks_per_job;
    row_begin = static_cast<int>(blockIdx.x) % b.blocks_per_job * b.rows_per_block;
    row_end = min(row_begin + b.rows_per_block, b.product.n);
    n_strips = kSmallBatchWarps / b.split;
    n_tiles = (row_end - row_begin + kTileRows * n_strips - 1) / (kTileRows * n_strips);
    slice = warp_id() % b.split;
    strip = warp_id() / b.split;
    ring = dynamic_smem() + warp_id() * kStages<F> * StageLayout<F>::kBytes;
  }

  // Begins with the first unit; fills all stages but one.
  __device__ __forceinline__ void start() {
    const Product& p = b.product;
    if (b.jobs != Jobs::sums) {
      matrices[0] = matrix(p.w);
      if (p.swiglu) matrices[1] = matrix(p.up);
    }
    tile = slice < b.n_units ? 0 : n_tiles;
    segment = 0;
    unit = slice;
    stage = 0;
    if (tile < n_tiles) locate();
    for (int i = 0; i < kStages<F> - 1; ++i) copy_next();
  }

  // Starts the copy of the next unit, if there is one; counts as a group of copies in any case.
  __device__ __forceinline__ void copy_next() {
    if (tile < n_tiles) {
      copy_unit<F>(ring + stage * StageLayout<F>::kBytes, rows, row_stride, n_rows, unit, planes);
      advance();
    }
    cp_async_commit();
  }

 private:
  const std::byte* matrices[2] = {};  // of the job, but for sums
  // The next unit to be copied, its stage, and the tile's rows of w.
  int tile = 0, segment = 0, unit = 0, stage = 0;
  const std::byte* rows = nullptr;
  int row_stride = 0, n_rows = 0;

  __device__ __forceinline__ const std::byte* matrix(const Weight& w) const {
    if (b.jobs == Jobs::matrices) return matrix_of(b.product, w, job);
    return expert_matrix(w, b.jobs == Jobs::experts ? job : state.experts[0]);
  }

  __device__ __forceinline__ void locate() {
    const Product& p = b.product;
    const bool up = p.swiglu && segment == 1;
    const int first = row_begin + (tile * n_strips + strip) * kTileRows;
    const std::byte* of_segment = b.jobs == Jobs::sums ? expert_matrix(p.w, state.experts[segment])
                                                       : (up ? matrices[1] : matrices[0]);
    row_stride = static_cast<int>(up ? p.up.row_stride : p.w.row_stride);
    rows = of_segment + static_cast<int64_t>(first) * row_stride;
    n_rows = row_end - first;
  }

  __device__ __forceinline__ void advance() {
    stage = stage + 1 == kStages<F> ? 0 : stage + 1;
    unit += b.split;
    if (unit < b.n_units) return;
    unit = slice;
    if (++segment == b.n_segments) {
      segment = 0;
      if (++tile == n_tiles) return;
    }
    locate();
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

__device__ __forceinline__ void add_scaled(float (&sum)[4], const float (&d)[4], float low,
                                           float high) {
  sum[0] = fmaf(low, d[0], sum[0]);
  sum[1] = fmaf(low, d[1], sum[1]);
  sum[2] = fmaf(high, d[2], sum[2]);
  sum[3] = fmaf(high, d[3], sum[3]);
}

__device__ __forceinline__ float4 scaled(const float (&x)[4], float scale) {
  return make_float4(scale * x[0], scale * x[1], scale * x[2], scale * x[3]);
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
    add_minima<F>(weights, x, static_cast<uint32_t>(at + unit * sums_bytes(Fragments<F>::kRows)),
                  sums);
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
  if (!b.product.routed) stream.start();
  pdl_wait();
  const int n_found = find_rows(b, stream.job, state);
  float4* parts = reinterpret_cast<float4*>(dynamic_smem() + b.parts_at);

  for (int first = 0; first < n_found; first += 8 * NT) {
    Columns<NT> x;
    x.n_rows = min(n_found - first, 8 * NT);
    if (b.product.routed) stream.start();
    x.base = stage_job<Fragments<F>::kRows>(b, first, x.n_rows, state);
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
          part[nt * kWarpThreads + lane_id()] = scaled(sums[nt], Fragments<F>::kResultScale);
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
