// Absorbed attention of many query rows: one piece of the line (attention_schedule.cuh) per block.
//
//   s[i, j] = q[i] . key[j]          i < 64 query rows, j < 64 cells of a tile, 576 dims
//   o[i]    = sum_j 2^(s[i, j] - m[i]) latent[j] / l[i]      512 dims, kept in registers
//
// with the running maximum m and sum l of the row; the part's o and log2 of its weight, m + log2 l,
// go to memory. q holds scale * log2(e).
//
// 8 warps. Scores: each warp 32 rows x 16 cells, q in shared memory. Values: each warp all rows x
// 64 columns: 128 accumulators a thread. Weights 2^(s - m) pass between the two through shared
// memory as 16-bit numbers.
//
// A tile is 73.7 KB from memory, 570 KB through shared memory, and 2,176 products of 16 x 8 x 16:
// about 4,500 clocks, so 460 TFLOP/s were all else free.
// Shared memory: two stages would take 231 KB of the 227 KiB there are; one takes 157.
// Error: weights and q rounded to 11 bits (8 for bf16), sums in float32: nmse about 1e-7 (1e-5).
#pragma once

#include "backends/cuda/kernels/attention_tiles.cuh"

namespace mla::cuda {

namespace wide {

inline constexpr int kRows = 64, kTileCells = 64;
inline constexpr int kTileBytes = kTileCells * kRowBytes;  // 73,728
inline constexpr int kRawBytes = kTileCells * kRawRowBytes;
inline constexpr int kWeightRowBytes = kTileCells * 2;  // 8 chunks, swizzled as tiles are
inline constexpr int kCellParts = kTileWarps / 2;

// q, weights, maxima of each part of the cells, factors, limits.
inline constexpr int kFixedBytes = kRows * (kRowBytes + kWeightRowBytes + (kCellParts + 2) * 4);
__host__ __device__ inline constexpr int smem_bytes(bool q8, int n_stages) {
  const int tiles = q8 ? kTileBytes + (n_stages > 0 ? kRawBytes : 0) : n_stages * kTileBytes;
  return kFixedBytes + tiles;
}

template <class T, bool kQ8, bool kBy16>
class Block {
 public:
  __device__ Block(const AttentionArgs& a, const AbsorbedPlan& plan)
      : a_(a), plan_(plan), variant_(plan.variants[kWide]) {}

  // Tiles [begin, end) of unit `unit` of the span, the rows that are number `sub` of its fold.
  __device__ void run(const WorkEntry& entry, int unit, int sub, int begin, int end, int slot) {
    const int first_row = (unit * variant_.fold + sub) * kRows;
    const int n_rows = min(entry.n_tokens * a_.h - first_row, kRows);
    const Span span = entry.span();
    const int seen = visible_cells(span, (first_row + n_rows - 1) / a_.h);
    end = min(end, ceil_div(seen, kTileCells));
    if (begin >= end) return write_unseen_part<kRows>(variant_, slot);
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
  static constexpr int kRowTiles = 2;  // of a warp's scores
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

  // ---- shared memory: q, weights, maxima, factors, limits, tiles
  // ---------------------------------- Every place is known when the code is compiled and takes no
  // register.
  static constexpr int kQueryBytes = kRows * kRowBytes;
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
    return dynamic_smem() + kFixedBytes + index * kTileBytes;
  }

  // ---- copies -----------------------------------------------------------------------------------
  // Asks for the rows of `tile`, which are known, and looks up those of the tile after it.
  __device__ void issue(bool has, const Span& span, int tile) {
    if (has) {
      if constexpr (kQ8) {
        if (variant_.n_stages > 0) copy_raw<kBy16>(a_, rows_, stage(1));
      } else {
        copy_tile<kBy16>(a_, rows_, stage(stage_));
      }
      if (!kQ8 || variant_.n_stages > 0) rows_ = find_rows<kTileCells>(a_, span, tile + 1);
    }
    cp_async_commit();
  }

  // Waits for `tile`, asks for the one after it; where the tile lies.
  __device__ std::byte* next_tile(const Span& span, int tile, int end) {
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (kQ8) {
      if (variant_.n_stages > 0) {
        convert_raw<kTileCells>(stage(1), stage(0));
      } else {
        convert_rows<kBy16>(a_, rows_, stage(0));
        cp_async_commit();
        cp_async_wait<0>();
        rows_ = find_rows<kTileCells>(a_, span, tile + 1);
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
    copy_queries(span, first_row, n_rows, queries());
    rows_ = find_rows<kTileCells>(a_, span, tile);
    issue(true, span, tile);
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
  int stage_ = 0;              // where the tile in flight goes
  TileRows<kTileCells> rows_;  // of the next tile to ask for
  float out_[kOutTiles][kColumnTiles][4];
  float max_[kRowTiles][2], sum_[kRowTiles][2];  // sums: of this thread's cells alone
};

}  // namespace wide

template <class T, bool kQ8, bool kBy16>
__global__ void __launch_bounds__(kTileThreads, 1)
    wide_kernel(const __grid_constant__ AttentionArgs a,
                const __grid_constant__ AbsorbedPlan plan) {
#if !defined(MLA_CUDA_ARCH) || MLA_CUDA_ARCH == 0 || MLA_CUDA_ARCH >= 800  // see absorbed_fits
  const Line line = find_line(a, plan, kWide);
  const AbsorbedVariant& variant = plan.variants[kWide];
  const int block = static_cast<int>(blockIdx.x) / variant.fold;
  const int sub = static_cast<int>(blockIdx.x) % variant.fold;
  if (idles(block, busy_blocks(variant, line.totals))) return;
  pdl_wait();
  wide::Block<T, kQ8, kBy16> worker(a, plan);
  for_pieces(a, plan, kWide, line, block, [&](const WorkEntry& e, int unit, int from, int to) {
    const int slot = (e.units_before + unit + block) * variant.fold + sub;
    worker.run(e, unit, sub, from, to, slot);
  });
#endif
}

}  // namespace mla::cuda
