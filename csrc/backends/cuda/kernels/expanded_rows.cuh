// Rows of queries in the expanded contraction: what a block works at, queries, softmax, results.
// Formula, shapes, layout and error bound: attention_expanded.cuh.
#pragma once

#include "backends/cuda/kernels/expanded_plan.cuh"

namespace mla::cuda {

inline constexpr int kExpandedThreads = 128;
inline constexpr int kExpandedWarps = kExpandedThreads / 32;
inline constexpr int kMaxExpandedDim = 256;  // N + R, and V

// By value to the kernel.
struct ExpandedArgs {
  View q_nope, q_rope;
  const __half* keys;    // [cells, H, N], cells row_elems apart
  const __half* values;  // [cells, H, V], the same
  const __half* rope;    // [cells, r_padded]
  int64_t row_elems;
  float* out;       // [T, H, V]; between rounds not yet divided by the sums
  float2* running;  // [T, H]: maximum (times log2 e) and sum
  ExpandedPlan plan;
  int round;
  int h, n, r, v;
  int r_padded;  // multiple of 8
  int dim;       // N + r_padded, padded to a multiple of 16
  float scale;
};

// Multiples of 128 bytes, which the permutation of pieces needs.
constexpr int expanded_row_bytes(int n_elems) { return (n_elems + 63) / 64 * 128; }

// Dimensions; 0: known when it runs. `kValue` bounds V where the others are 0.
template <int kMTiles_, int kKeys_, int kNope_, int kRope_, int kValue_>
struct ExpandedDims {
  static constexpr int kMTiles = kMTiles_, kNope = kNope_, kRope = kRope_, kValue = kValue_;
  static constexpr bool kStatic = kNope > 0;
  static constexpr int kKeys = kKeys_;            // of a step
  static constexpr int kRows = 64 * kMTiles;      // queries of a block
  static constexpr int kWarpRows = 16 * kMTiles;  // of a warp
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kValueTiles = kValue / 8;
  static constexpr int kValueBytes = expanded_row_bytes(kValue);
  static_assert(kGroupCells % kKeys == 0 && kKeys % 16 == 0);
};
// What a block works at: a head of a tile, and the cells of its span that the round holds.
struct ExpandedJob {
  ExpandedTile tile;
  int head;
  int begin, end;  // cells of the span
  int row;         // of the round, where cell `begin` lies
  bool is_last;    // no later cell is visible
};

__device__ inline ExpandedJob find_job(const ExpandedArgs& a, int item) {
  ExpandedJob job;
  job.tile = a.plan.tiles[item / a.h];
  job.head = item % a.h;
  const int visible = job.tile.visible + job.tile.n_rows - 1;
  const int64_t first = int64_t{a.round} * a.plan.cells - job.tile.begin;  // cell at row 0
  job.begin = static_cast<int>(max(first, int64_t{0}));
  job.end = static_cast<int>(max(min(first + a.plan.cells, int64_t{visible}), int64_t{0}));
  job.row = static_cast<int>(job.begin - first);
  job.is_last = job.end == visible;
  return job;
}

// Piece `piece` of row `row`, counted from the tile's begin.
__device__ inline int piece_at(int row, int piece, int row_bytes) {
  return row * row_bytes + ((piece ^ (row & 7)) << 4);
}

// ---- queries ------------------------------------------------------------------------------------
// 2^-e with the largest magnitude in [2^e, 2^(e + 1)), and 2^e; ones where that is not finite.
__device__ inline float2 power_scale(float largest) {
  const int exponent = (__float_as_int(largest) >> 23) & 255;
  if (exponent == 255) return {1.0f, 1.0f};
  const int inverse = min(max(254 - exponent, 1), 253);
  return {__int_as_float(inverse << 23), __int_as_float((254 - inverse) << 23)};
}

// The warp's own queries, each times a power of two. What makes a product with one a score, times
// log2 e, goes to `factors`. at(row, piece): where 8 numbers of a query belong.
template <class D, class At>
__device__ inline void load_queries(const ExpandedArgs& a, const ExpandedJob& job, const At& at,
                                    float* factors) {
  constexpr int kPerLane = D::kStatic ? (D::kNope + D::kRope) / 32 : kMaxExpandedDim / 32;
  // Rows whose loads overlap: registers are free here, and nothing else hides the wait.
  constexpr int kTogether = 8;
  const int lane = lane_id();
  const int warp_row = warp_id() * D::kWarpRows;
  const int dim = D::kStatic ? D::kNope + D::kRope : a.dim;
  const float sign = a.scale < 0 ? -1.0f : 1.0f;
  // Never 0: 0 times a masked score is no number.
  const float scale = fmaxf(fabsf(a.scale) * 1.44269504f, 1e-30f);
  for (int first = warp_row; first < warp_row + D::kWarpRows; first += kTogether) {
    float x[kTogether][kPerLane];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int token = job.tile.token + first + i;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int e = lane + 32 * j;
        const bool there = first + i < job.tile.n_rows && e < a.n + a.r;
        x[i][j] = !there    ? 0.0f
                  : e < a.n ? query_value(a.q_nope, token, job.head, e)
                            : query_value(a.q_rope, token, job.head, e - a.n);
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      float largest = 0.0f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) largest = fmaxf(largest, fabsf(x[i][j]));
      const float2 power = power_scale(warp_max(largest));
      if (lane == 0) factors[first + i] = scale * power.y;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int e = lane + 32 * j;
        if (e >= dim) continue;
        auto* to = reinterpret_cast<__half*>(at(first + i, e / 8)) + e % 8;
        *to = __float2half_rn(x[i][j] * power.x * sign);
      }
    }
  }
  __syncwarp();
}

__device__ inline uint32_t pack_halves(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Sums of 16 columns as an operand of the next product.
__device__ inline void pack_weights(const float (&left)[4], const float (&right)[4],
                                    uint32_t (&a)[4]) {
  a[0] = pack_halves(left[0], left[1]);
  a[1] = pack_halves(left[2], left[3]);
  a[2] = pack_halves(right[0], right[1]);
  a[3] = pack_halves(right[2], right[3]);
}

// ---- softmax -----------------------------------------------------------------------------------
// A warp's rows, in fragments of m16n8k16: thread (g, q) = (lane / 4, lane % 4) holds rows g and
// g + 8 of each 16, columns 2q and 2q + 1 of each 8.
template <class D>
struct ExpandedRows {
  float o[D::kMTiles][D::kValueTiles][4];
  float top[D::kMTiles][2];  // maximum of the scores, times log2 e
  float sum[D::kMTiles][2];  // of the thread's columns
};
template <class D>
using ExpandedScores = float[D::kMTiles][D::kKeyTiles][4];

// Where a thread's rows lie: m-th 16 rows, lower (0) or upper (1) eight.
template <class D>
__device__ inline int tile_row(int m, int half) {
  return warp_id() * D::kWarpRows + 16 * m + 8 * half + lane_id() / 4;
}

// Columns from `limit` of the warp's first row on are not visible; one more with each row.
template <class D>
__device__ inline void mask_scores(int limit, ExpandedScores<D>& s) {
  const int lane = lane_id();
#pragma unroll
  for (int m = 0; m < D::kMTiles; ++m) {
#pragma unroll
    for (int i = 0; i < D::kKeyTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = 16 * m + lane / 4 + j / 2 * 8;
        if (8 * i + lane % 4 * 2 + j % 2 >= limit + row) s[m][i][j] = kMinusInf;
      }
    }
  }
}

// Scores become exponentials; the maximum and the sum of each row follow. What O has to be
// multiplied with is left in `rescale`.
template <class D>
__device__ inline void softmax_step(const float* factors, ExpandedScores<D>& s,
                                    ExpandedRows<D>& rows, float (&rescale)[D::kMTiles][2]) {
#pragma unroll
  for (int m = 0; m < D::kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = kMinusInf;
#pragma unroll
      for (int i = 0; i < D::kKeyTiles; ++i) {
        top = fmaxf(top, fmaxf(s[m][i][2 * half], s[m][i][2 * half + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float factor = factors[tile_row<D>(m, half)];
      top = fmaxf(rows.top[m][half], top * factor);
      rescale[m][half] = exp2_approx(rows.top[m][half] - top);
      rows.top[m][half] = top;
      float sum = rows.sum[m][half] * rescale[m][half];
#pragma unroll
      for (int i = 0; i < D::kKeyTiles; ++i) {
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; ++j) {
          s[m][i][j] = exp2_approx(fmaf(s[m][i][j], factor, -top));
          sum += s[m][i][j];
        }
      }
      rows.sum[m][half] = sum;
    }
  }
}

template <class D>
__device__ inline void rescale_rows(const float (&rescale)[D::kMTiles][2], ExpandedRows<D>& rows) {
#pragma unroll
  for (int m = 0; m < D::kMTiles; ++m) {
    // Soon no row meets a new maximum any more.
    const bool same = rescale[m][0] == 1.0f && rescale[m][1] == 1.0f;
    if (__ballot_sync(kAllLanes, !same) == 0) continue;
#pragma unroll
    for (int i = 0; i < D::kValueTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) rows.o[m][i][j] *= rescale[m][j / 2];
    }
  }
}

// ---- begin and end ------------------------------------------------------------------------------
// Sums at zero, or as the round before left them.
template <class D>
__device__ inline void begin_rows(const ExpandedArgs& a, const ExpandedJob& job,
                                  ExpandedRows<D>& rows) {
  const bool resumes = job.begin > 0;
#pragma unroll
  for (int m = 0; m < D::kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile_row<D>(m, half);
      const bool there = resumes && row < job.tile.n_rows;
      const int64_t at = int64_t{job.tile.token + row} * a.h + job.head;
      const float2 before = there ? a.running[at] : float2{kMinusInf, 0.0f};
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

}  // namespace mla::cuda
