// Products of one row of x with quantized weights: what a decoded token is made of.
//
//   out[n] = sum_k w[n][k] x[k]
//
// Cases: matvec.h. A unit of work is two rows of w (those of gate and up for a swiglu) of one slot;
// a warp goes through its units in segments of kSegment<F> weights, which it copies into a ring of
// its own in shared memory ahead of their use. Where slots are summed, a block has all those of its
// rows, and adds them up at the end in their order. x is staged once per block as integers
// (matvec_x.cuh), so that products are those of dp4a. Sums of x times the minima of the weights go
// with them.
//
// Short code is the point. A decoded token runs some hundred kernels of a few microseconds, each
// once: what a multiprocessor has not in its instruction cache of 128 KB comes from L2, and kernels
// that unroll their loops, or know many cases, wait for instructions longer than for weights.
// Tensor cores would need more code and multiply seven columns of nothing.
//
// Latency: 4.3 TB/s for 1 us are 33 KB a multiprocessor; two blocks of eight rings hold 70 to 110.
// Weights that do not depend on the choice of experts are asked for before the kernel waits for the
// ones ahead: they are constants. The rings of two blocks leave room for the blocks of the next
// kernel, which does the same while this one ends.
// Instructions: 16 cycles of a multiprocessor bring the bytes of 468 weights of 4.5 bits at 4.3
// TB/s, and issue 2,048 lanes' instructions, 4.4 a weight. The products take 1.5 to 2.
// Error: x is rounded to 2^-16 of the largest of its 16; all else is exact or float32.
#pragma once

#include "backends/cuda/kernels/math.cuh"
#include "backends/cuda/kernels/matvec_x.cuh"
#include "backends/cuda/kernels/pieces.cuh"
#include "backends/cuda/kernels/row_ring.cuh"
#include "backends/cuda/product_kernels.h"

namespace mla::cuda {

namespace matvec {

// Weights of a segment: whole pieces of 16 bytes in every plane.
template <Format F>
inline constexpr int kSegment = F == Format::Q8_0 ? 1024 : 2048;
template <Format F>
inline constexpr int kSegmentBlocks = kSegment<F> / kElemsPerBlock<F>;
template <Format F>
inline constexpr int kBlockPieces = PackedPlanes<F>::fields[0].bytes / 16;
template <Format F>
inline constexpr int kSegmentPieces = kBlockPieces<F>* kSegmentBlocks<F>;

template <Format F>
constexpr int count_planes() {
  int n = 0;
  for (const Field& field : PackedPlanes<F>::fields) n += field.bytes > 0;
  return n;
}
template <Format F>
inline constexpr int kStageBytes = 2 * static_cast<int>(packed_row_bytes<F>(kSegmentBlocks<F>));
template <Format F>
inline constexpr int kStages = 3 * kStageBytes<F> <= 7168 ? 3 : 2;
inline constexpr int kBarrierRoom = 32;  // of a warp: a multiple of 16
template <Format F>
using Ring = RowRing<count_planes<F>(), kStages<F>, kStageBytes<F>>;

template <Format F>
SegmentPlanes segment_planes(int64_t n_blocks) {
  SegmentPlanes planes;
  for (int i = 0; i < kMaxPlanes; ++i) {
    planes.at[i] = static_cast<int>(plane_offset<F>(i, n_blocks));
    planes.stage_at[i] = static_cast<int>(plane_offset<F>(i, kSegmentBlocks<F>));
    planes.bytes[i] = PackedPlanes<F>::fields[static_cast<size_t>(i)].bytes * kSegmentBlocks<F>;
  }
  return planes;
}

// ---- where a warp is ----------------------------------------------------------------------------

// Units of work are pairs of rows, slot after slot: of all, or of a block where slots are summed.
struct Share {
  int base;     // first pair of the block where slots are summed
  int n_pairs;  // of a slot
  int begin, end;
};

__device__ __forceinline__ Share share_of(const MatVec& m) {
  Share share = {0, m.n_pairs, 0, 0};
  int worker = warp_id();
  if (m.weights != nullptr) {
    share.base = static_cast<int>(blockIdx.x) * m.pairs_per_block;
    share.n_pairs = min(m.n_pairs - share.base, m.pairs_per_block);
  } else {
    worker = warp_id() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  }
  const int n_units = share.n_pairs * m.n_slots;
  share.begin = min(worker * m.units_per_warp, n_units);
  share.end = min(share.begin + m.units_per_warp, n_units);
  return share;
}

// What is copied next. row: of lane % 2.
struct Ahead {
  int unit, slot, pair, segment;
  const std::byte* row;
};

// experts: lane s has that of slot s.
__device__ __forceinline__ const std::byte* row_at(const MatVec& m, int experts, int slot,
                                                   int pair) {
  const int expert = __shfl_sync(kAllLanes, experts, slot);
  const int second = lane_id() & 1;
  const int n = m.swiglu ? pair : 2 * pair + second;
  return m.w[second] + expert * m.matrix_stride + n * m.row_step;
}

__device__ __forceinline__ Ahead begin_copies(const MatVec& m, const Share& share, int experts) {
  const int slot = share.begin / share.n_pairs, pair = share.begin - slot * share.n_pairs;
  return {share.begin, slot, pair, 0, row_at(m, experts, slot, share.base + pair)};
}

// The next segment into the ring.
template <class Ring>
__device__ __forceinline__ void push(const MatVec& m, const Share& share, int experts, Ahead& a,
                                     Ring& ring) {
  if (a.unit >= share.end) return ring.push_nothing();
  const int pair = share.base + a.pair;
  const bool alone = (lane_id() & 1) != 0 && !m.swiglu && 2 * pair + 1 >= m.n;
  ring.push(alone ? a.row - m.row_step : a.row, a.segment);
  if (++a.segment < m.n_segments) return;
  a.segment = 0;
  ++a.unit;
  a.row += m.pair_bytes;
  if (++a.pair < share.n_pairs || a.unit >= share.end) return;
  a.pair = 0;
  a.row = row_at(m, experts, ++a.slot, share.base);
}

// ---- products -----------------------------------------------------------------------------------

template <Format F, int part>
__device__ __forceinline__ void add_part(const Piece<F> (&pieces)[2], const StagedX& x,
                                         uint32_t piece, float (&sums)[2]) {
  const uint32_t k = Piece<F>::k(piece, part);
  const uint4 high = *reinterpret_cast<const uint4*>(x.high + k);
  const uint4 low = *reinterpret_cast<const uint4*>(x.low + k);
  const float2 factor = x.factors[k / 16];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int top = 0, bottom = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int w = pieces[r].template word<part>(j);
      top = dp4a(w, static_cast<int>(pieces::word(high, j)), top);
      bottom = dp4a(w, static_cast<int>(pieces::word(low, j)), bottom);
    }
    const float2 scale = pieces[r].template scale_min<part>();
    sums[r] = fmaf(scale.x * factor.x, static_cast<float>(256 * top + bottom), sums[r]);
    sums[r] = fmaf(-scale.y, factor.y, sums[r]);
  }
}

// sums[r] += the lane's share of a segment of row r times x from there on.
template <Format F>
__device__ __forceinline__ void add_segment(const MatVec& m, const std::byte* stage, int segment,
                                            const StagedX& row, float (&sums)[2]) {
  const int first = segment * kSegment<F>;
  const StagedX x = {row.high + first, row.low + first, row.factors + first / 16};
  const uint32_t n = min(m.n_pieces - segment * kSegmentPieces<F>, kSegmentPieces<F>);
#pragma unroll 2
  for (uint32_t piece = threadIdx.x % kWarpThreads; piece < n; piece += kWarpThreads) {
    Piece<F> pieces[2];
    pieces[0].load(stage, m.planes.stage_at, piece);
    pieces[1].load(stage + kStageBytes<F> / 2, m.planes.stage_at, piece);
    add_part<F, 0>(pieces, x, piece, sums);
    if constexpr (Piece<F>::kParts > 1) add_part<F, 1>(pieces, x, piece, sums);
    if constexpr (Piece<F>::kParts > 2) {
      add_part<F, 2>(pieces, x, piece, sums);
      add_part<F, 3>(pieces, x, piece, sums);
    }
  }
}

// ---- results ------------------------------------------------------------------------------------

// Pairs of a slot whose sums are taken together. Lane 8 j + 4 r + .. is in charge of row r of pair
// j.
inline constexpr int kBatch = 4;
inline constexpr int kBatchFloats = 2 * kBatch * kWarpThreads;  // [pair][row][lane]

// The row that the lane is in charge of, m.n where there is none.
__device__ __forceinline__ int row_in_charge(const MatVec& m, int first_pair, int n_pairs) {
  const int pair = first_pair + lane_id() / 8, second = lane_id() / 4 % 2;
  if (lane_id() / 8 >= n_pairs) return m.n;
  if (m.swiglu) return second == 0 ? pair : m.n;
  return min(2 * pair + second, m.n);
}

// The sum of that row.
__device__ __forceinline__ float batch_sum(const float* sums) {
  const auto* at = reinterpret_cast<const float4*>(sums + 8 * lane_id());
  const float4 a = at[0], b = at[1];
  float x = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// sum: of row n. parts: of the block's summed slots, [row][slot].
__device__ __forceinline__ void store(const MatVec& m, const Share& share, int slot, int n,
                                      float sum, float residual, float* parts) {
  if (m.swiglu) {
    const float up = __shfl_xor_sync(kAllLanes, sum, 4);
    sum = silu_exact(sum) * up;
  }
  if (lane_id() % 4 != 0 || n >= m.n) return;
  if (m.weights != nullptr) {
    parts[(n - 2 * share.base) * m.n_slots + slot] = sum;
  } else {
    m.out[int64_t{slot} * m.n + n] = sum + residual;
  }
}

// Of summed slots: the block's rows, slot by slot.
__device__ __forceinline__ void store_sums(const MatVec& m, const Share& share,
                                           const float* parts) {
  const int row = static_cast<int>(threadIdx.x), n = 2 * share.base + row;
  const bool stores = row < 2 * share.n_pairs && n < m.n;
  const float residual =
      stores && m.residual != nullptr ? load_coherent(m.residual + n * m.residual_step) : 0.0f;
  __syncthreads();
  if (!stores) return;
  float sum = 0.0f;
#pragma unroll 1
  for (int slot = 0; slot < m.n_slots; ++slot) sum += parts[row * m.n_slots + slot];
  m.out[n] = sum + residual;
}

}  // namespace matvec

template <Format F>
__global__ void __launch_bounds__(32 * kMostMatVecWarps, 1)
    matvec_kernel(const __grid_constant__ MatVec m) {
  using namespace matvec;
  std::byte* rings = dynamic_smem();
  std::byte* barriers = rings + m.n_warps * Ring<F>::kBytes;
  float* batches = reinterpret_cast<float*>(barriers + m.n_warps * kBarrierRoom);
  float* raw = batches + m.n_warps * kBatchFloats;
  std::byte* x = reinterpret_cast<std::byte*>(raw + (m.copies_x ? m.n_x * m.k : 0));
  float* parts = reinterpret_cast<float*>(x + m.n_x * staged_bytes(m.k));
  float* batch = batches + warp_id() * kBatchFloats;
  Ring<F> ring(m.planes, m.row_bytes, rings + warp_id() * Ring<F>::kBytes,
               barriers + warp_id() * kBarrierRoom);
  const Share share = share_of(m);
  int experts = 0, n_ahead = 0;
  float weights = 1.0f;  // lane s has those of slot s
  if (m.ids != nullptr) {
    pdl_wait();
    if (lane_id() < m.n_slots) {
      experts = m.ids[lane_id() * m.id_stride];
      if (m.weights != nullptr) weights = m.weights[lane_id() * m.weight_stride];
      if (experts < 0 || experts >= m.n_experts) {
        experts = 0;
        weights = NAN;
      }
    }
  }
  Ahead ahead = begin_copies(m, share, experts);
#pragma unroll 1
  for (; n_ahead < kStages<F>; ++n_ahead) push(m, share, experts, ahead, ring);
  fetch_norm(m);
  m.waits_last ? pdl_release() : pdl_wait();
  stage(m, raw, x);
  int slot = share.begin / share.n_pairs, pair = share.begin - slot * share.n_pairs;
#pragma unroll 1
  for (int unit = share.begin; unit < share.end;) {
    const int n_pairs = min(min(share.end - unit, share.n_pairs - pair), kBatch);
    const int n = row_in_charge(m, share.base + pair, n_pairs);
    float residual = 0.0f;
    if (m.residual != nullptr && n < m.n)
      residual = load_coherent(m.residual + n * m.residual_step);
    const StagedX row = staged_row(x, m.n_x > 1 ? slot : 0, m.k);
#pragma unroll 1
    for (int j = 0; j < n_pairs; ++j) {
      float sums[2] = {0.0f, 0.0f};
#pragma unroll 1
      for (int segment = 0; segment < m.n_segments; ++segment) {
        add_segment<F>(m, ring.front(), segment, row, sums);
        ring.pop();
        push(m, share, experts, ahead, ring);
      }
      batch[2 * kWarpThreads * j + lane_id()] = sums[0];
      batch[2 * kWarpThreads * j + kWarpThreads + lane_id()] = sums[1];
    }
    __syncwarp();
    const float sum = __shfl_sync(kAllLanes, weights, slot) * batch_sum(batch);
    store(m, share, slot, n, sum, residual, parts);
    __syncwarp();
    unit += n_pairs;
    pair += n_pairs;
    if (pair == share.n_pairs) {
      pair = 0;
      ++slot;
    }
  }
  if (m.weights != nullptr) store_sums(m, share, parts);
  if (m.waits_last) pdl_wait();
}

template <Format F>
constexpr void add_matvec_kernel(ProductKernels& kernels) {
  using namespace matvec;
  kernels.matvec = {
      matvec_kernel<F>, segment_planes<F>, kSegmentBlocks<F>, kBlockPieces<F>,
      Ring<F>::kBytes + kBarrierRoom + kBatchFloats * static_cast<int>(sizeof(float))};
}

}  // namespace mla::cuda
