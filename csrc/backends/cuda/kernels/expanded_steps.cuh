// One step of the expanded contraction: 64 cells come to shared memory, scores, softmax, values.
// Formula, shapes, layout and error bound: attention_expanded.cuh, whose kernel these make up.
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
template <class D>
constexpr size_t expanded_smem_bytes(int dim) {
  return static_cast<size_t>((D::kRows + D::kKeys) * expanded_row_bytes(dim) +
                             D::kKeys * D::kValueBytes);
}

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

// ---- loads --------------------------------------------------------------------------------------
// kKeys rows of n_pieces (kPieces, if that is known) 16-byte pieces.
template <int kKeys, int kPieces>
__device__ inline void load_columns(std::byte* tile, int row_bytes, int first_piece,
                                    const __half* src, int64_t row_elems, int n_pieces) {
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kPieces > 0) {
    // A thread's rows are a multiple of 8 apart, so their pieces lie in one column.
    constexpr int kRowsApart = kExpandedThreads / kPieces;
    static_assert(kRowsApart % 8 == 0);
    const int row = thread / kPieces;
    std::byte* to = tile + piece_at(row, first_piece + thread % kPieces, row_bytes);
    const __half* from = src + row * row_elems + thread % kPieces * 8;
#pragma unroll
    for (int i = 0; i < kKeys / kRowsApart; ++i) {
      cp_async16(to + i * kRowsApart * row_bytes, from);
      from += kRowsApart * row_elems;
    }
  } else {
    for (int i = thread; i < kKeys * n_pieces; i += kExpandedThreads) {
      const int row = i / n_pieces;
      const int piece = i - row * n_pieces;
      cp_async16(tile + piece_at(row, first_piece + piece, row_bytes),
                 src + row * row_elems + piece * 8);
    }
  }
}

template <class D>
__device__ inline void load_keys(const ExpandedArgs& a, const ExpandedJob& job, int first,
                                 std::byte* tile, int row_bytes) {
  const int64_t row = job.row + first;
  const int n_pieces = (D::kStatic ? D::kNope : a.n) / 8;
  const __half* keys = a.keys + row * a.row_elems + int64_t{job.head} * n_pieces * 8;
  load_columns<D::kKeys, D::kNope / 8>(tile, row_bytes, 0, keys, a.row_elems, n_pieces);
  load_columns<D::kKeys, D::kRope / 8>(tile, row_bytes, n_pieces, a.rope + row * a.r_padded,
                                       a.r_padded, a.r_padded / 8);
  cp_async_commit();
}

template <class D>
__device__ inline void load_values(const ExpandedArgs& a, const ExpandedJob& job, int first,
                                   std::byte* tile) {
  const int n_pieces = (D::kStatic ? D::kValue : a.v) / 8;
  const __half* values =
      a.values + (job.row + first) * a.row_elems + int64_t{job.head} * n_pieces * 8;
  load_columns<D::kKeys, D::kStatic ? D::kValue / 8 : 0>(tile, D::kValueBytes, 0, values,
                                                         a.row_elems, n_pieces);
  cp_async_commit();
}

// What loads do not write of a row, but products read: the pieces up to a multiple of 16 numbers.
template <class D>
__device__ inline void clear_keys_values(std::byte* keys, int key_bytes, std::byte* values) {
  const uint4 zero = {0, 0, 0, 0};
  for (int i = threadIdx.x; i < D::kKeys * key_bytes / 16; i += kExpandedThreads) {
    reinterpret_cast<uint4*>(keys)[i] = zero;
  }
  for (int i = threadIdx.x; i < D::kKeys * D::kValueBytes / 16; i += kExpandedThreads) {
    reinterpret_cast<uint4*>(values)[i] = zero;
  }
}

// 2^-e with the largest magnitude in [2^e, 2^(e + 1)), and 2^e; ones where that is not finite.
__device__ inline float2 power_scale(float largest) {
  const int exponent = (__float_as_int(largest) >> 23) & 255;
  if (exponent == 255) return {1.0f, 1.0f};
  const int inverse = min(max(254 - exponent, 1), 253);
  return {__int_as_float(inverse << 23), __int_as_float((254 - inverse) << 23)};
}

// The warp's own queries, each times a power of two; what undoes it goes to row_scale.
template <class D>
__device__ inline void load_queries(const ExpandedArgs& a, const ExpandedJob& job, std::byte* q,
                                    int row_bytes, float* row_scale) {
  constexpr int kPerLane = D::kStatic ? (D::kNope + D::kRope) / 32 : kMaxExpandedDim / 32;
  constexpr int kTogether = 4;  // rows whose loads overlap
  const int lane = lane_id();
  const int warp_row = warp_id() * D::kWarpRows;
  const int dim = D::kStatic ? D::kNope + D::kRope : a.dim;
  const float sign = a.scale < 0 ? -1.0f : 1.0f;
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
      if (lane == 0) row_scale[first + i] = power.y;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int e = lane + 32 * j;
        if (e >= dim) continue;
        std::byte* at = q + piece_at(first + i, e / 8, row_bytes) + e % 8 * 2;
        *reinterpret_cast<__half*>(at) = __float2half_rn(x[i][j] * power.x * sign);
      }
    }
  }
  __syncwarp();
}

__device__ inline uint32_t pack_halves(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// ---- one step -----------------------------------------------------------------------------------
// A warp's rows, in fragments of m16n8k16: thread (g, q) = (lane / 4, lane % 4) holds rows g and
// g + 8 of each 16, columns 2q and 2q + 1 of each 8.
template <class D>
struct ExpandedRows {
  float o[D::kMTiles][D::kValueTiles][4];
  float top[D::kMTiles][2];     // maximum of the scores, times log2 e
  float sum[D::kMTiles][2];     // of the thread's columns
  float factor[D::kMTiles][2];  // what makes a product of the mma a score, times log2 e
};
template <class D>
using ExpandedScores = float[D::kMTiles][D::kKeyTiles][4];

template <class D>
__device__ inline void multiply_keys(const std::byte* q, const std::byte* k, int row_bytes,
                                     int n_pairs, ExpandedScores<D>& s) {
  const int lane = lane_id();
#pragma unroll
  for (int m = 0; m < D::kMTiles; ++m) {
#pragma unroll
    for (int i = 0; i < D::kKeyTiles; ++i) s[m][i][0] = s[m][i][1] = s[m][i][2] = s[m][i][3] = 0.0f;
  }
  // Rows and columns that change from product to product are multiples of 8 and 2: what they add
  // to a lane's first address are constants, but for the permutation.
  const std::byte* q_lane = q + (warp_id() * D::kWarpRows + lane % 16) * row_bytes;
  const std::byte* k_lane = k + (lane % 8 + lane / 16 * 8) * row_bytes;
  const int q_piece = lane / 16 ^ lane % 8;
  const int k_piece = lane / 8 % 2 ^ lane % 8;
#pragma unroll
  for (int pair = 0; pair < n_pairs; ++pair) {  // 16 dims: two pieces
    uint32_t qa[D::kMTiles][4];
#pragma unroll
    for (int m = 0; m < D::kMTiles; ++m) {
      ldmatrix_x4(qa[m], q_lane + 16 * m * row_bytes + ((2 * pair ^ q_piece) << 4));
    }
#pragma unroll
    for (int i = 0; i < D::kKeyTiles; i += 2) {
      uint32_t kb[4];
      ldmatrix_x4(kb, k_lane + 8 * i * row_bytes + ((2 * pair ^ k_piece) << 4));
#pragma unroll
      for (int m = 0; m < D::kMTiles; ++m) {
        mma_f16(s[m][i], qa[m], {kb[0], kb[1]});
        mma_f16(s[m][i + 1], qa[m], {kb[2], kb[3]});
      }
    }
  }
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

// Scores become exponentials; the maximum, sum and O of each row follow.
template <class D>
__device__ inline void softmax_step(ExpandedScores<D>& s, ExpandedRows<D>& rows) {
#pragma unroll
  for (int m = 0; m < D::kMTiles; ++m) {
    float rescale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = kMinusInf;
#pragma unroll
      for (int i = 0; i < D::kKeyTiles; ++i) {
        top = fmaxf(top, fmaxf(s[m][i][2 * half], s[m][i][2 * half + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float factor = rows.factor[m][half];
      top = fmaxf(rows.top[m][half], top * factor);
      rescale[half] = exp2_approx(rows.top[m][half] - top);
      rows.top[m][half] = top;
      float sum = rows.sum[m][half] * rescale[half];
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
    // Soon no row meets a new maximum any more.
    const bool same = rescale[0] == 1.0f && rescale[1] == 1.0f;
    if (__ballot_sync(kAllLanes, !same) == 0) continue;
#pragma unroll
    for (int i = 0; i < D::kValueTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) rows.o[m][i][j] *= rescale[j / 2];
    }
  }
}

template <class D>
__device__ inline void multiply_values(const std::byte* v, int n_value_tiles,
                                       const ExpandedScores<D>& s, ExpandedRows<D>& rows) {
  const int lane = lane_id();
  const std::byte* v_lane = v + lane % 16 * D::kValueBytes;
  const int v_piece = lane / 16 ^ lane % 8;
#pragma unroll
  for (int i = 0; i < D::kKeyTiles; i += 2) {  // 16 cells
    uint32_t p[D::kMTiles][4];
#pragma unroll
    for (int m = 0; m < D::kMTiles; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = &s[m][i + j / 2][j % 2 * 2];
        p[m][j] = pack_halves(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int c = 0; c < D::kValueTiles; c += 2) {
      if (!D::kStatic && c >= n_value_tiles) break;
      uint32_t vb[4];
      ldmatrix_x4_trans(vb, v_lane + 8 * i * D::kValueBytes + ((c ^ v_piece) << 4));
#pragma unroll
      for (int m = 0; m < D::kMTiles; ++m) {
        mma_f16(rows.o[m][c], p[m], {vb[0], vb[1]});
        mma_f16(rows.o[m][c + 1], p[m], {vb[2], vb[3]});
      }
    }
  }
}

}  // namespace mla::cuda
