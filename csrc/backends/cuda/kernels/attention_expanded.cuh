// Causal attention of many tokens over expanded keys and values, one head at a time.
//
//   out[t][h] = sum_i p_i V[i][h] / sum_i p_i,  p_i = exp(scale q[t][h] . K[i][h] - max)
//   q [T, H, N] and [T, H, R] F32, any strides; K[i][h] = [keys[i][h] (N) | rope[i] (R)], rope keys
//   shared by all heads; V[i][h] values[i][h]; f16, rows of flat cells (expanded_plan.cuh)
//   -> out [T, H, V] F32
//
// A work item is one head of one tile of queries. Blocks of 4 warps fetch items from a counter, the
// longest first; each warp owns 16 * kMTiles queries, their sums in registers:
//
//   shared  Q [64 * kMTiles][N + R], K [kKeys][N + R], V [kKeys][V], rows padded to 128 bytes, the
//           16-byte pieces of a row permuted by row % 8: eight rows of a column meet all banks
//   step    kKeys cells: S = Q K^T while V arrives, then softmax and O += P V while the next K does
//
// Two blocks share a multiprocessor, so that one multiplies while the other takes exponentials. The
// running maximum and sum of a row (and its O, in `out`) go from round to round of the cells.
//
// Error: operands in f16 (a query row times a power of two, so that none overflows), products and
// sums in float32, exponentials to 2 ulp: relative 2^-11 per operand, normalized mean square error
// below 1e-6 of what the same f16 keys and values give.
#pragma once

#include "backends/cuda/kernels/expanded_rows.cuh"

namespace mla::cuda {

template <class D>
constexpr size_t expanded_smem_bytes(int dim) {
  return static_cast<size_t>((D::kRows + D::kKeys) * expanded_row_bytes(dim) +
                             D::kKeys * D::kValueBytes);
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

// ---- products ---------------------------------------------------------------------------------
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
    for (int m = 0; m < D::kMTiles; ++m) pack_weights(s[m][i], s[m][i + 1], p[m]);
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

// ---- the kernel -------------------------------------------------------------------------------
// Shared memory of a block, in the order of expanded_smem_bytes().
struct ExpandedTiles {
  std::byte *q, *k, *v;
  int row_bytes;  // of q and k
};

template <class D>
__device__ inline void attend(const ExpandedArgs& a, const ExpandedJob& job,
                              const ExpandedTiles& tiles, float* factors) {
  const int n_cells = job.end - job.begin;
  const int first_row = warp_id() * D::kWarpRows;
  const int n_pairs = (D::kStatic ? D::kNope + D::kRope : a.dim) / 16;
  // Of the warp's first and last query, counted from job.begin.
  const int visible = job.tile.visible + first_row - job.begin;
  const int last_visible = visible + min(D::kWarpRows, job.tile.n_rows - first_row) - 1;
  load_keys<D>(a, job, 0, tiles.k, tiles.row_bytes);
  const auto at = [&](int row, int piece) {
    return tiles.q + piece_at(row, piece, tiles.row_bytes);
  };
  load_queries<D>(a, job, at, factors);
  ExpandedRows<D> rows;
  begin_rows<D>(a, job, rows);
  for (int first = 0; first < n_cells; first += D::kKeys) {
    // Warps without a query that sees these cells only copy and wait.
    const bool sees = first_row < job.tile.n_rows && first < last_visible;
    cp_async_wait<0>();
    __syncthreads();
    load_values<D>(a, job, first, tiles.v);
    ExpandedScores<D> s;
    if (sees) {
      multiply_keys<D>(tiles.q, tiles.k, tiles.row_bytes, n_pairs, s);
      if (first + D::kKeys > visible) mask_scores<D>(visible - first, s);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (first + D::kKeys < n_cells)
      load_keys<D>(a, job, first + D::kKeys, tiles.k, tiles.row_bytes);
    if (!sees) continue;
    float rescale[D::kMTiles][2];
    softmax_step<D>(factors, s, rows, rescale);
    rescale_rows<D>(rescale, rows);
    multiply_values<D>(tiles.v, a.v / 8, s, rows);
  }
  end_rows<D>(a, job, rows);
}

// Persistent: any grid serves, two blocks per multiprocessor are meant.
template <class D>
__global__ void __launch_bounds__(kExpandedThreads, 2)
    attend_expanded(const __grid_constant__ ExpandedArgs a) {
  __shared__ int next;
  __shared__ ExpandedJob job;  // not in registers, of which the sums leave none
  __shared__ float factors[D::kRows];
  pdl_wait();
  if (a.plan.rows[a.round] == 0) return;
  ExpandedTiles tiles;
  tiles.row_bytes =
      D::kStatic ? expanded_row_bytes(D::kNope + D::kRope) : expanded_row_bytes(a.dim);
  tiles.q = dynamic_smem();
  tiles.k = tiles.q + D::kRows * tiles.row_bytes;
  tiles.v = tiles.k + D::kKeys * tiles.row_bytes;
  const int n_items = *a.plan.n_tiles * a.h;
  if constexpr (!D::kStatic) clear_keys_values<D>(tiles.k, tiles.row_bytes, tiles.v);
  for (;;) {
    __syncthreads();  // all are done with the tiles and the job
    if (threadIdx.x == 0) {
      next = atomicAdd(&a.plan.counters[a.round], 1);
      if (next < n_items) job = find_job(a, next);
    }
    __syncthreads();
    if (next >= n_items) return;
    if (job.begin < job.end) attend<D>(a, job, tiles, factors);
  }
}

}  // namespace mla::cuda
