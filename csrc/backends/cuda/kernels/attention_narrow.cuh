// Absorbed attention of few query rows, a decoded token's: one piece of the line
// (attention_schedule.cuh) per block. Formula, parts and errors are those of attention_wide.cuh,
// with i < 16 query rows and j < 32 cells of a tile.
//
// 8 warps. Scores: each warp 16 rows x 16 cells x 144 of the dims, q in 36 registers, so that a
// tile is read once; four partial sums of a score meet in shared memory, where each warp weighs two
// rows. Values: each warp all rows x 64 columns: 32 accumulators a thread.
//
// A tile is 36.9 KB from memory, 90 KB through shared memory and 272 products of 16 x 8 x 16. Its
// barriers and their latencies come to 2,400 clocks, in which an SM's share of 4.3 TB/s would bring
// more: two blocks share an SM, and the one's latencies are the other's work.
// Where the context is short the time is that of one tile, so what can be is done before the
// kernels ahead have ended: the block finds its piece and asks for its cells to come into L2.
// Registers: 128, and 87 KB of shared memory (Q8_0: 92), so that two fit.
#pragma once

#include "backends/cuda/kernels/attention_tiles.cuh"

namespace mla::cuda {

namespace narrow {

inline constexpr int kRows = 16, kTileCells = 32;
inline constexpr int kStages = 2;
inline constexpr int kDimParts = 4, kCellParts = kTileWarps / kDimParts;
inline constexpr int kPartSteps = kSteps / kDimParts;      // 9
inline constexpr int kTileBytes = kTileCells * kRowBytes;  // 36,864
inline constexpr int kRawBytes = kTileCells * kRawRowBytes;
inline constexpr int kWeightRowBytes = kTileCells * 2;  // 4 chunks
// Floats from row to row of partial scores: fragments of rows side by side meet other banks.
inline constexpr int kScorePitch = kTileCells + 8;
inline constexpr int kScoreBytes = kDimParts * kRows * kScorePitch * 4;
inline constexpr int kWeightBytes = kRows * kWeightRowBytes;
inline constexpr int kFixedBytes = kScoreBytes + kWeightBytes + 2 * kRows * 4;
static_assert(kFixedBytes % 128 == 0);

__host__ __device__ inline constexpr int smem_bytes(bool q8) {
  return kFixedBytes + (q8 ? kTileBytes + kStages * kRawBytes : kStages * kTileBytes);
}

template <class T, bool kQ8, bool kBy16>
class Block {
 public:
  __device__ Block(const AttentionArgs& a, const AbsorbedPlan& plan)
      : a_(a), plan_(plan), variant_(plan.variants[kNarrow]) {}

  // Looks up where the first tiles from `begin` on are: before run().
  __device__ void locate(const WorkEntry& entry, int begin) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      first_rows_[i] = find_rows<kTileCells>(a_, entry.span(), begin + i);
    }
  }
  // Those tiles come into L2.
  __device__ void prefetch(int n_tiles) const {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < n_tiles) prefetch_rows(a_, first_rows_[i], kQ8 ? a_.c / 32 * kQ8Bytes : 2 * a_.c);
    }
  }

  // Tiles [begin, end) of unit `unit` of the span.
  __device__ void run(const WorkEntry& entry, int unit, int begin, int end, int slot) {
    const int first_row = unit * kRows;
    const int n_rows = min(entry.n_tokens * a_.h - first_row, kRows);
    const Span span = entry.span();
    const int seen = visible_cells(span, (first_row + n_rows - 1) / a_.h);
    end = min(end, ceil_div(seen, kTileCells));
    if (begin >= end) return write_unseen_part<kRows>(variant_, slot);
    start(span, first_row, n_rows, begin, end);
    for (int tile = begin; tile < end; ++tile) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      std::byte* cells = raw_or_tile(tile - begin);
      if (tile == begin) load_queries(stage(kStages - 1));
      if constexpr (kQ8) {
        convert_raw<kTileCells>(cells, tile_at());
        cells = tile_at();
        __syncthreads();
      }
      score(cells);
      __syncthreads();
      if (tile + kStages - 1 < end) issue(tile - begin + kStages - 1);
      cp_async_commit();
      if (tile + kStages < end) rows_ = find_rows<kTileCells>(a_, span, tile + kStages);
      weigh(tile);
      __syncthreads();
      add_values(cells);
    }
    finish(n_rows, slot);
  }

 private:
  static constexpr int kColumnTiles = kWarpColumns / 8;

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int dim_part() { return warp() % kDimParts; }
  __device__ static int cell_part() { return warp() / kDimParts; }
  // What this thread weighs: two cells of one row.
  __device__ static int weighed_row() { return warp() * 2 + lane() / 16; }
  __device__ static int weighed_cell() { return lane() % 16 * 2; }

  // ---- shared memory: partial scores, weights, factors, sums, the tile (Q8_0 only), stages
  // --------
  __device__ static float* scores() { return dynamic_smem<float>(); }
  __device__ static std::byte* weights() { return dynamic_smem() + kScoreBytes; }
  __device__ static float* factors() {
    return reinterpret_cast<float*>(dynamic_smem() + kScoreBytes + kWeightBytes);
  }
  __device__ static float* sums() { return factors() + kRows; }
  __device__ static std::byte* tile_at() { return dynamic_smem() + kFixedBytes; }
  __device__ static std::byte* stage(int index) {
    return tile_at() + (kQ8 ? kTileBytes + index * kRawBytes : index * kTileBytes);
  }
  __device__ static std::byte* raw_or_tile(int index) { return stage(index % kStages); }
  // Chunk `chunk` of a row of weights: rows two by two share 128 bytes.
  __device__ static std::byte* weight_chunk(int row, int chunk) {
    return weights() + row * kWeightRowBytes + (chunk ^ (row / 2 % 4)) * kChunk;
  }

  // Asks for the tile whose rows are known.
  __device__ void issue(int index) {
    std::byte* to = stage(index % kStages);
    if constexpr (kQ8) {
      copy_raw<kBy16>(a_, rows_, to);
    } else {
      copy_tile<kBy16>(a_, rows_, to);
    }
  }

  // ---- the beginning of a piece -----------------------------------------------------------------
  __device__ void start(const Span& span, int first_row, int n_rows, int begin, int end) {
    limit_ = 0;
    if (weighed_row() < n_rows) limit_ = visible_cells(span, (first_row + weighed_row()) / a_.h);
    max_ = kMinusInf;
    sum_ = 0.0f;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      for (float& x : out_[n]) x = 0.0f;
    }
    copy_queries(span, first_row, n_rows, stage(kStages - 1));
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      rows_ = first_rows_[i];
      if (begin + i < end) issue(i);
      cp_async_commit();
    }
    rows_ = first_rows_[kStages - 1];
  }

  // They take the stage that is filled last, and come with the first tile.
  __device__ void copy_queries(const Span& span, int first_row, int n_rows, std::byte* to) {
    const int64_t row = int64_t{span.first_token - plan_.first_token} * a_.h + first_row;
    const std::byte* from = plan_.q + row * kRowBytes;
    for (int at = threadIdx.x; at < kRows * kRowChunks; at += kTileThreads) {
      const int r = at / kRowChunks, chunk = at % kRowChunks;
      cp_async16(chunk_at(to, r, chunk), from + int64_t{at} * kChunk, r < n_rows);
    }
  }

  // Steps 4 i + dim_part() of 16 dims, as left operands.
  __device__ void load_queries(std::byte* q) {
    const int matrix = lane() / 8;
    const int row = (matrix & 1) * 8 + lane() % 8, chunk = 2 * dim_part() + matrix / 2;
#pragma unroll
    for (int i = 0; i < kPartSteps; ++i) ldmatrix_x4(q_[i], chunk_at(q, row, chunk, 8 * i));
  }

  // ---- scores -----------------------------------------------------------------------------------
  __device__ void score(std::byte* cells) const {
    const int matrix = lane() / 8;
    const int cell = cell_part() * 16 + matrix / 2 * 8 + lane() % 8;
    const int chunk = 2 * dim_part() + (matrix & 1);
    float s[2][2][4] = {};  // two chains for each 8 cells: four products under way
#pragma unroll
    for (int i = 0; i < kPartSteps; ++i) {
      uint32_t b[4];
      ldmatrix_x4(b, chunk_at(cells, cell, chunk, 8 * i));
      mma<T>(s[i % 2][0], q_[i], {b[0], b[1]});
      mma<T>(s[i % 2][1], q_[i], {b[2], b[3]});
    }
    float* to = scores() + (dim_part() * kRows + lane() / 4) * kScorePitch + cell_part() * 16 +
                lane() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        *reinterpret_cast<float2*>(to + half * (8 * kScorePitch) + n * 8) = {
            s[0][n][2 * half] + s[1][n][2 * half], s[0][n][2 * half + 1] + s[1][n][2 * half + 1]};
      }
    }
  }

  // Scores of a tile become weights, and factors for what was summed before.
  __device__ void weigh(int tile) {
    const float* from = scores() + weighed_row() * kScorePitch + weighed_cell();
    float2 s = {0.0f, 0.0f};
#pragma unroll
    for (int part = 0; part < kDimParts; ++part) {
      const float2 x = *reinterpret_cast<const float2*>(from + part * (kRows * kScorePitch));
      s.x += x.x;
      s.y += x.y;
    }
    const int cell = tile * kTileCells + weighed_cell();
    if (cell >= limit_) s.x = kMinusInf;
    if (cell + 1 >= limit_) s.y = kMinusInf;
    float top = fmaxf(s.x, s.y);
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    }
    top = fmaxf(top, max_);
    const float origin = top == kMinusInf ? 0.0f : top;  // nothing seen so far: all weights are 0
    const float factor = exp2_approx(max_ - origin);
    max_ = top;
    const float lo = exp2_approx(s.x - origin), hi = exp2_approx(s.y - origin);
    sum_ = sum_ * factor + (lo + hi);
    if (lane() % 16 == 0) factors()[weighed_row()] = factor;
    std::byte* chunk = weight_chunk(weighed_row(), lane() % 16 / 4);
    reinterpret_cast<uint32_t*>(chunk)[lane() % 4] = pack_operands<T>(lo, hi);
  }

  // ---- values -----------------------------------------------------------------------------------
  __device__ void add_values(std::byte* cells) {
    const int matrix = lane() / 8, r = lane() % 8;
    std::byte* columns = cells + warp() * (kColumnTiles * kChunk);
    const float top = factors()[lane() / 4], low = factors()[8 + lane() / 4];
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      out_[n][0] *= top;
      out_[n][1] *= top;
      out_[n][2] *= low;
      out_[n][3] *= low;
    }
#pragma unroll
    for (int k = 0; k < kTileCells / 16; ++k) {
      uint32_t w[4];
      ldmatrix_x4(w, weight_chunk((matrix & 1) * 8 + r, 2 * k + matrix / 2));
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, chunk_at(columns, k * 16 + (matrix & 1) * 8 + r, matrix / 2, n));
        mma<T>(out_[n], w, {b[0], b[1]});
        mma<T>(out_[n + 1], w, {b[2], b[3]});
      }
    }
  }

  // ---- the end of a piece -----------------------------------------------------------------------
  // o / l and the part's weight.
  __device__ void finish(int n_rows, int slot) {
    float sum = sum_;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane() % 16 == 0) {
      sums()[weighed_row()] = sum;
      variant_.lse[int64_t{slot} * kRows + weighed_row()] =
          sum == 0.0f ? kMinusInf : max_ + log2f(sum);
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 8 + lane() / 4;
      const float scale = sums()[row] == 0.0f ? 0.0f : 1.0f / sums()[row];
      if (row >= n_rows) continue;
      const int64_t at = (int64_t{slot} * kRows + row) * kLatentDims + warp() * kWarpColumns;
      auto* to = reinterpret_cast<uint32_t*>(variant_.parts) + at / 2 + lane() % 4;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        to[n * 4] = pack_operands<T>(scale * out_[n][2 * half], scale * out_[n][2 * half + 1]);
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // before the next piece writes any of it
  }

  const AttentionArgs& a_;
  const AbsorbedPlan& plan_;
  const AbsorbedVariant& variant_;
  TileRows<kTileCells> rows_;  // of the next tile to ask for
  TileRows<kTileCells> first_rows_[kStages];
  uint32_t q_[kPartSteps][4];
  float out_[kColumnTiles][4];
  float max_, sum_;  // of weighed_row(); the sum is of this thread's cells alone
  int limit_;        // cells that the row sees
};

}  // namespace narrow

template <class T, bool kQ8, bool kBy16>
__global__ void __launch_bounds__(kTileThreads, 2)
    narrow_kernel(const __grid_constant__ AttentionArgs a,
                  const __grid_constant__ AbsorbedPlan plan) {
#if !defined(MLA_CUDA_ARCH) || MLA_CUDA_ARCH == 0 || MLA_CUDA_ARCH >= 800  // see absorbed_fits
  const Line line = find_line(a, plan, kNarrow);
  const int block = static_cast<int>(blockIdx.x);
  if (idles(block, busy_blocks(plan.variants[kNarrow], line.totals))) return;
  narrow::Block<T, kQ8, kBy16> worker(a, plan);
  bool waits = true;
  for_pieces(a, plan, kNarrow, line, block, [&](const WorkEntry& e, int unit, int from, int to) {
    worker.locate(e, from);
    if (waits) {
      worker.prefetch(to - from);
      pdl_wait();
      waits = false;
    }
    worker.run(e, unit, from, to, e.units_before + unit + block);
  });
#endif
}

}  // namespace mla::cuda
