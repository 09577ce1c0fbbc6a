// Absorbed attention over one piece of the line (attention_schedule.cuh) per block:
//
//   s[i, j] = q[i] . key[j]          i < kRows query rows, j < 64 cells of a tile, 576 dims
//   o[i]    = sum_j 2^(s[i, j] - m[i]) latent[j] / l[i]      512 dims, kept in registers
//
// with the running maximum m and sum l of the row; the part's o and log2 of its weight, m + log2 l,
// go to memory. q holds scale * log2(e).
//
// 8 warps. Scores: 16 rows, each warp 8 cells, q in registers (144), so that a tile is read once;
// 64 rows, each warp 32 rows x 16 cells, q in shared memory. Values: each warp all rows x 64
// columns: 32 or 128 accumulators a thread. Weights 2^(s - m) pass between the two through shared
// memory as 16-bit numbers.
//
// A tile is 73.7 KB from memory and, with 16 rows, 140 KB through shared memory and 544 products of
// 16 x 8 x 16: some 1,500 of the 4,400 clocks that an SM's share of 3.9 TB/s gives it; 64 rows: 570
// KB and 2,176 products, about 4,500 clocks, so 460 TFLOP/s were all else free.
// Shared memory, 2 stages: 16 rows 152 KB (q passes through the stage that waits), 64 rows 231 KB
// of the 227 KiB there are.
// Error: weights and q rounded to 11 bits (8 for bf16), sums in float32: nmse about 1e-7 (1e-5).
#pragma once

#include "backends/cuda/kernels/attention_tiles.cuh"

namespace mla::cuda {

inline constexpr int kSteps = kKeyDims / 16;  // products along the dims of a score
inline constexpr int kTileWarps = kTileThreads / 32;
inline constexpr int kWarpColumns = kLatentDims / kTileWarps;  // 64 of the output
inline constexpr int kWeightRowBytes = kTileCells * 2;         // 8 chunks, swizzled as tiles are

__host__ __device__ inline constexpr int absorbed_cell_parts(int rows) {
  return rows == 64 ? kTileWarps / 2 : kTileWarps;
}
// What is not tiles: q (64 rows only), weights, maxima of each part of the cells, factors, limits.
__host__ __device__ inline constexpr int absorbed_fixed_bytes(int rows) {
  return (rows == 64 ? rows * kRowChunks * kChunk : 0) + rows * kWeightRowBytes +
         rows * (absorbed_cell_parts(rows) + 2) * 4;
}
__host__ __device__ inline constexpr int absorbed_smem_bytes(int rows, bool q8, int n_stages) {
  const int tiles = q8 ? kTileBytes + (n_stages > 0 ? kRawBytes : 0) : n_stages * kTileBytes;
  return absorbed_fixed_bytes(rows) + tiles;
}

template <class T, int kRows, bool kQ8>
class AbsorbedBlock {
 public:
  __device__ AbsorbedBlock(const AttentionArgs& a, const AbsorbedPlan& plan)
      : a_(a), plan_(plan), variant_(plan.variants[kRows == 64 ? kWide : kNarrow]) {}

  // Tiles [begin, end) of unit `unit` of the span, the rows that are number `sub` of its fold.
  __device__ void run(const WorkEntry& entry, int unit, int sub, int begin, int end, int slot) {
    const int first_row = (unit * variant_.fold + sub) * kRows;
    const int n_rows = min(entry.n_tokens * a_.h - first_row, kRows);
    const Span span = entry.span();
    const int seen = visible_cells(span, (first_row + n_rows - 1) / a_.h);
    end = min(end, ceil_div(seen, kTileCells));
    if (begin >= end) {  // all of it is later than these tokens
      if (threadIdx.x < kRows) variant_.lse[int64_t{slot} * kRows + threadIdx.x] = kMinusInf;
      return;
    }
    start(span, first_row, n_rows, begin);
    for (int tile = begin; tile < end; ++tile) {
      std::byte* cells = next_tile(span, tile, end);
      score(cells, tile);
      add_values(cells);
      if (!kQ8 && variant_.n_stages == 1 && tile + 1 < end) {
        __syncthreads();
        issue(tile + 1 < end, span, tile + 1);
      }
    }
    finish(n_rows, slot);
  }

 private:
  static constexpr bool kQueryInRegisters = kRows == 16;
  static constexpr int kCellParts = absorbed_cell_parts(kRows);
  static constexpr int kRowTiles = kRows == 64 ? 2 : 1;  // of a warp's scores
  static constexpr int kCellTiles = kTileCells / 8 / kCellParts;
  static constexpr int kOutTiles = kRows / 16;
  static constexpr int kColumnTiles = kWarpColumns / 8;

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int cell_part() { return warp() % kCellParts; }
  // Row `half` of row tile m among this thread's scores.
  __device__ static int score_row(int m, int half) {
    return warp() / kCellParts * 32 + m * 16 + half * 8 + lane() / 4;
  }

  // ---- shared memory: q (64 rows only), weights, maxima, factors, limits, tiles
  // --------------------------- Every place is known when the code is compiled and takes no
  // register.
  static constexpr int kQueryBytes = kQueryInRegisters ? 0 : kRows * kRowChunks * kChunk;
  static constexpr int kMaximaAt = kQueryBytes + kRows * kWeightRowBytes;
  __device__ static std::byte* queries() { return dynamic_smem(); }
  __device__ static std::byte* weights() { return dynamic_smem() + kQueryBytes; }
  __device__ static float* maxima() {  // [kCellParts][kRows]
    return reinterpret_cast<float*>(dynamic_smem() + kMaximaAt);
  }
  __device__ static float* factors() { return maxima() + kRows * kCellParts; }  // [kRows]
  __device__ static int* limits() {  // [kRows]: cells that the row sees
    return reinterpret_cast<int*>(factors() + kRows);
  }
  __device__ static std::byte* stage(int index) {
    return dynamic_smem() + absorbed_fixed_bytes(kRows) + index * kTileBytes;
  }

  // ---- copies -----------------------------------------------------------------------------------
  // Asks for the rows of `tile`, which are known, and looks up those of the tile after it.
  __device__ void issue(bool has, const Span& span, int tile) {
    if (has) {
      if constexpr (kQ8) {
        if (variant_.n_stages > 0) copy_raw(a_, rows_, plan_.copies_16, stage(1));
      } else {
        copy_tile(a_, rows_, plan_.copies_16, stage(stage_));
      }
      if (!kQ8 || variant_.n_stages > 0) rows_ = find_rows(a_, span, tile + 1);
    }
    cp_async_commit();
  }

  // Waits for `tile`, asks for the one after it; where the tile lies.
  __device__ std::byte* next_tile(const Span& span, int tile, int end) {
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (kQ8) {
      if (variant_.n_stages > 0) {
        convert_raw(stage(1), stage(0));
      } else {
        convert_rows(a_, rows_, plan_.copies_16, stage(0));
        cp_async_commit();
        cp_async_wait<0>();
        rows_ = find_rows(a_, span, tile + 1);
      }
      __syncthreads();
      issue(tile + 1 < end, span, tile + 1);
      return stage(0);
    }
    std::byte* cells = stage(stage_);
    if (variant_.n_stages > 1) {
      stage_ ^= 1;
      issue(tile + 1 < end, span, tile + 1);
    }
    return cells;
  }

  // ---- the beginning of a piece -----------------------------------------------------------------
  __device__ void copy_queries(const Span& span, int first_row, int n_rows, std::byte* to) {
    const int64_t row = int64_t{span.first_token - plan_.first_token} * a_.h + first_row;
    const std::byte* from = plan_.q + row * kKeyDims * int64_t{sizeof(T)};
    for (int at = threadIdx.x; at < kRows * kRowChunks; at += kTileThreads) {
      const int r = at / kRowChunks, chunk = at % kRowChunks;
      cp_async16(chunk_at(to, r, chunk), from + int64_t{at} * kChunk, r < n_rows);
    }
  }

  __device__ void start(const Span& span, int first_row, int n_rows, int tile) {
    if (threadIdx.x < kRows) {
      const int row = static_cast<int>(threadIdx.x);
      limits()[row] = row < n_rows ? visible_cells(span, (first_row + row) / a_.h) : 0;
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        max_[m][half] = kMinusInf;
        sum_[m][half] = 0.0f;
      }
    }
#pragma unroll
    for (int m = 0; m < kOutTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        for (float& x : out_[m][n]) x = 0.0f;
      }
    }
    // With one stage q and the tile share it; else q takes the place that is read last.
    const bool one_stage = !kQ8 && variant_.n_stages == 1;
    std::byte* q = queries();
    if constexpr (kQueryInRegisters) q = stage(kQ8 || one_stage ? 0 : stage_ ^ 1);
    copy_queries(span, first_row, n_rows, q);
    rows_ = find_rows(a_, span, tile);
    if (!(kQueryInRegisters && one_stage)) issue(true, span, tile);
    if constexpr (kQueryInRegisters) {
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) load_query(q_fragments_[k], q, 0, k);
      __syncthreads();
      if (one_stage) issue(true, span, tile);
    }
  }

  // ---- scores -----------------------------------------------------------------------------------
  // 16 rows x 16 dims as the left operand.
  __device__ void load_query(uint32_t (&fragment)[4], std::byte* q, int row, int k) const {
    const int matrix = lane() / 8;
    ldmatrix_x4(fragment, chunk_at(q, row + (matrix & 1) * 8 + lane() % 8, matrix / 2, 2 * k));
  }

  __device__ void products(std::byte* cells, float (&s)[kRowTiles][kCellTiles][4]) const {
    const int matrix = lane() / 8, r = lane() % 8;
    const int cell = cell_part() * kCellTiles * 8;
    if constexpr (kQueryInRegisters) {
      float chains[2][4] = {};  // two warps a scheduler: four products under way hide their latency
#pragma unroll
      for (int k = 0; k < kSteps; k += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, chunk_at(cells, cell + r, matrix, 2 * k));
        mma<T>(chains[0], q_fragments_[k], {b[0], b[1]});
        mma<T>(chains[1], q_fragments_[k + 1], {b[2], b[3]});
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) s[0][0][i] = chains[0][i] + chains[1][i];
    } else {
#pragma unroll 4  // the places of the swizzle repeat
      for (int k = 0; k < kSteps; ++k) {
        uint32_t b[4];
        ldmatrix_x4(b, chunk_at(cells, cell + matrix / 2 * 8 + r, matrix & 1, 2 * k));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          uint32_t q[4];
          load_query(q, queries(), warp() / kCellParts * 32 + m * 16, k);
          mma<T>(s[m][0], q, {b[0], b[1]});
          mma<T>(s[m][1], q, {b[2], b[3]});
        }
      }
    }
  }

  // Scores of a tile become weights in shared memory, and factors for what was summed before.
  __device__ void score(std::byte* cells, int tile) {
    float s[kRowTiles][kCellTiles][4] = {};
    products(cells, s);
    const int cell = tile * kTileCells + cell_part() * kCellTiles * 8 + lane() % 4 * 2;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = kMinusInf;
        const int limit = limits()[score_row(m, half)];
#pragma unroll
        for (int n = 0; n < kCellTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = s[m][n][2 * half + i];
            if (cell + n * 8 + i >= limit) x = kMinusInf;
            top = fmaxf(top, x);
          }
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        if (lane() % 4 == 0) maxima()[cell_part() * kRows + score_row(m, half)] = top;
      }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) weigh(s[m], m, half);
    }
    __syncthreads();
  }

  __device__ void weigh(const float (&s)[kCellTiles][4], int m, int half) {
    const int row = score_row(m, half);
    float top = max_[m][half];
#pragma unroll
    for (int part = 0; part < kCellParts; ++part) top = fmaxf(top, maxima()[part * kRows + row]);
    const float origin = top == kMinusInf ? 0.0f : top;  // nothing seen so far: all weights are 0
    const float factor = exp2_approx(max_[m][half] - origin);
    max_[m][half] = top;
    sum_[m][half] *= factor;
    if (cell_part() == 0 && lane() % 4 == 0) factors()[row] = factor;
#pragma unroll
    for (int n = 0; n < kCellTiles; ++n) {
      const float lo = exp2_approx(s[n][2 * half] - origin);
      const float hi = exp2_approx(s[n][2 * half + 1] - origin);
      sum_[m][half] += lo + hi;
      const int chunk = (cell_part() * kCellTiles + n) ^ (row & 7);
      *reinterpret_cast<uint32_t*>(weights() + row * kWeightRowBytes + chunk * kChunk +
                                   lane() % 4 * 4) = pack_operands<T>(lo, hi);
    }
  }

  // ---- values -----------------------------------------------------------------------------------
  __device__ void add_values(std::byte* cells) {
    const int matrix = lane() / 8, r = lane() % 8;
    std::byte* columns = cells + warp() * (kColumnTiles * kChunk);
#pragma unroll
    for (int m = 0; m < kOutTiles; ++m) {
      const float top = factors()[m * 16 + lane() / 4], low = factors()[m * 16 + 8 + lane() / 4];
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        out_[m][n][0] *= top;
        out_[m][n][1] *= top;
        out_[m][n][2] *= low;
        out_[m][n][3] *= low;
      }
    }
#pragma unroll
    for (int k = 0; k < kTileCells / 16; ++k) {
      uint32_t w[kOutTiles][4];
#pragma unroll
      for (int m = 0; m < kOutTiles; ++m) {
        const int row = m * 16 + (matrix & 1) * 8 + r;
        const int chunk = (2 * k + matrix / 2) ^ (row & 7);
        ldmatrix_x4(w[m], weights() + row * kWeightRowBytes + chunk * kChunk);
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, chunk_at(columns, k * 16 + (matrix & 1) * 8 + r, matrix / 2, n));
#pragma unroll
        for (int m = 0; m < kOutTiles; ++m) {
          mma<T>(out_[m][n], w[m], {b[0], b[1]});
          mma<T>(out_[m][n + 1], w[m], {b[2], b[3]});
        }
      }
    }
  }

  // ---- the end of a piece -----------------------------------------------------------------------
  // Sums of all parts of the cells, then o / l and the part's weight.
  __device__ void finish(int n_rows, int slot) {
    __syncthreads();  // maxima and factors have been read
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sum_[m][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane() % 4 == 0) maxima()[cell_part() * kRows + score_row(m, half)] = sum;
        if (lane() % 4 == 0 && cell_part() == 0) factors()[score_row(m, half)] = max_[m][half];
      }
    }
    __syncthreads();
    if (threadIdx.x < kRows) {
      const float sum = row_sum(static_cast<int>(threadIdx.x));
      variant_.lse[int64_t{slot} * kRows + threadIdx.x] =
          sum == 0.0f ? kMinusInf : factors()[threadIdx.x] + log2f(sum);
    }
#pragma unroll
    for (int m = 0; m < kOutTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m * 16 + half * 8 + lane() / 4;
        const float sum = row_sum(row);
        const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
        if (row >= n_rows) continue;
        const int64_t at = (int64_t{slot} * kRows + row) * kLatentDims + warp() * kWarpColumns;
        auto* to = reinterpret_cast<uint32_t*>(variant_.parts) + at / 2 + lane() % 4;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          to[n * 4] =
              pack_operands<T>(scale * out_[m][n][2 * half], scale * out_[m][n][2 * half + 1]);
        }
      }
    }
    __syncthreads();  // before the next piece writes any of it
  }

  __device__ float row_sum(int row) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kCellParts; ++i) sum += maxima()[i * kRows + row];
    return sum;
  }

  const AttentionArgs& a_;
  const AbsorbedPlan& plan_;
  const AbsorbedVariant& variant_;
  int stage_ = 0;  // where the tile in flight goes
  TileRows rows_;  // of the next tile to ask for
  uint32_t q_fragments_[kQueryInRegisters ? kSteps : 1][4];
  float out_[kOutTiles][kColumnTiles][4];
  float max_[kRowTiles][2], sum_[kRowTiles][2];  // sums: of this thread's cells alone
};

template <class T, int kRows, bool kQ8>
__global__ void __launch_bounds__(kTileThreads, 1)
    absorbed_kernel(const __grid_constant__ AttentionArgs a,
                    const __grid_constant__ AbsorbedPlan plan) {
#if !defined(MLA_CUDA_ARCH) || MLA_CUDA_ARCH == 0 || MLA_CUDA_ARCH >= 800  // see absorbed_fits
  constexpr int kVariant = kRows == 64 ? kWide : kNarrow;
  pdl_trigger();
  pdl_wait();
  const WorkEntry* entries = plan.entries + kVariant * a.n_spans;
  const WorkEntry first = first_entries(a, entries);  // asked for together with the totals
  const WorkTotals totals = plan.totals[kVariant];
  const AbsorbedVariant& variant = plan.variants[kVariant];
  const int block = static_cast<int>(blockIdx.x) / variant.fold;
  const int sub = static_cast<int>(blockIdx.x) % variant.fold;
  const int n_busy = busy_blocks(variant, totals);
  if (block >= n_busy) return;
  AbsorbedBlock<T, kRows, kQ8> worker(a, plan);
  const int end = piece_begin(totals.work, n_busy, block + 1);
  int at = piece_begin(totals.work, n_busy, block);
  WorkEntry entry = find_work(entries, first, totals.n_entries, at);
  while (true) {
    const int unit = (at - entry.work_before) / entry.tiles;
    const int tile = (at - entry.work_before) % entry.tiles;
    const int n = min(end - at, entry.tiles - tile);
    const int slot = (entry.units_before + unit + block) * variant.fold + sub;
    worker.run(entry, unit, sub, tile, tile + n, slot);
    at += n;
    if (at >= end) return;
    entry = find_work(entries, first_entries(a, entries), totals.n_entries, at);
  }
#endif
}

}  // namespace mla::cuda
