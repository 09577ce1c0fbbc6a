// The register tiles of attention, for attention.inc.cpp alone: products of small float32 matrices
// in scratch, and shuffles of whole vectors.
#pragma once

#include <utility>

#include "backends/cpu/attention_kernels.h"
#include "backends/cpu/simd/simd.h"

namespace mla::cpu::MLA_ISA {
namespace {

// 4 rows by 4 vectors are 16 accumulators, with the operands of a step 21 of AVX-512's 32
// registers; 4 by 2 leave room within the 16 that the other ISAs may count on. Both keep as many
// products in flight as two FMA units of latency 4 need.
constexpr int kRegRows = 4;
constexpr int kRegVectors = kLanes == 16 ? 4 : 2;
constexpr int kRegCells = kRegVectors;

// ---- shuffles -----------------------------------------------------------------------------------
// Lane l: of b where bit W of l is set, else of a; from lane l itself or from its partner l ^ W.
template <int W, bool kCrossA, bool kCrossB, size_t... L>
inline F32 choose(F32 a, F32 b, std::index_sequence<L...>) {
  return __builtin_shufflevector(
      a, b, ((L & W) != 0 ? kLanes + (kCrossB ? L ^ W : L) : (kCrossA ? L ^ W : L))...);
}
template <int W, bool kCrossA, bool kCrossB>
inline F32 choose(F32 a, F32 b) {
  return choose<W, kCrossA, kCrossB>(a, b, std::make_index_sequence<kLanes>{});
}

// Lane l of the result is the sum over the lanes of v[l]; halves the number of vectors each time.
template <int W = 1>
inline F32 reduce_each(F32* v) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / (2 * W); ++i) {
    const F32 a = v[2 * i];
    const F32 b = v[2 * i + 1];
    v[i] = choose<W, false, false>(a, b) + choose<W, true, true>(a, b);
  }
  if constexpr (2 * W < kLanes) return reduce_each<2 * W>(v);
  return v[0];
}

// The square of kLanes vectors, transposed: bit W of the row changes places with bit W of the lane.
template <int W = 1>
inline void transpose_square(F32* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & W) != 0) continue;
    const F32 a = v[i];
    const F32 b = v[i | W];
    v[i] = choose<W, false, true>(a, b);
    v[i | W] = choose<W, true, false>(a, b);
  }
  if constexpr (2 * W < kLanes) transpose_square<2 * W>(v);
}

// ---- out = out * start + a b --------------------------------------------------------------------
struct Product {
  const float* a;  // [m, k]
  int64_t a_row;
  const float* b;  // [k, n], each row readable up to pad_floats(n)
  int64_t b_row;
  float* out;  // [m, n]
  int64_t out_row;
  const float* start;  // [m] factors of what is in out; null: out is only written
  int64_t m, n, k;
};

inline F32 load_count(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float lane[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
  return load(lane);
}
inline void store_count(float* p, int64_t count, F32 v) {
  if (count >= kLanes) return store(p, v);
  float lane[kLanes];
  store(lane, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lane[i];
}

// Columns [j, j + cols) of out, V vectors of them. Rows past the last are the last one again: the
// same numbers, stored twice.
template <int V>
inline void product_columns(const Product& p, int64_t j, int64_t cols) {
  for (int64_t i = 0; i < p.m; i += kRegRows) {
    const float* a[kRegRows];
    float* out[kRegRows];
    F32 sum[kRegRows][V];
    for (int r = 0; r < kRegRows; ++r) {
      const int64_t row = i + r < p.m ? i + r : p.m - 1;
      a[r] = p.a + row * p.a_row;
      out[r] = p.out + row * p.out_row + j;
      const F32 factor = set1(p.start != nullptr ? p.start[row] : 0.0f);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[r][v] = p.start != nullptr ? load_count(out[r] + v * kLanes, cols - v * kLanes) * factor
                                       : zero();
      }
    }
    const float* b = p.b + j;
    for (int64_t k = 0; k < p.k; ++k, b += p.b_row) {
      F32 column[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) column[v] = load(b + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRegRows; ++r) {
        const F32 x = set1(a[r][k]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] += x * column[v];
      }
    }
    for (int r = 0; r < kRegRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        store_count(out[r] + v * kLanes, cols - v * kLanes, sum[r][v]);
      }
    }
  }
}

// Column by column block, so that k * kRegVectors vectors of b stay in the first-level cache while
// all rows of a pass by.
void product(const Product& p) noexcept {
  constexpr int64_t kColumns = kRegVectors * kLanes;
  int64_t j = 0;
  for (; j + kColumns <= p.n; j += kColumns) product_columns<kRegVectors>(p, j, kColumns);
  for (; j < p.n; j += kLanes) product_columns<1>(p, j, p.n - j);
}

// ---- out [n_rows, n_cells] = rows . cells -------------------------------------------------------
struct Dots {
  const float* rows;   // [n_rows, n]
  const float* cells;  // [n_cells, n]
  int64_t n;           // floats of a row, a multiple of kPadFloats
  int64_t n_rows, n_cells;
  float* out;
  int64_t out_row;
};

// One register tile; rows and cells past the last are the last one again.
inline void dots_tile(const Dots& d, int64_t row, int64_t cell) {
  const float* a[kRegRows];
  const float* b[kRegCells];
  for (int r = 0; r < kRegRows; ++r) {
    a[r] = d.rows + (row + r < d.n_rows ? row + r : d.n_rows - 1) * d.n;
  }
  for (int c = 0; c < kRegCells; ++c) {
    b[c] = d.cells + (cell + c < d.n_cells ? cell + c : d.n_cells - 1) * d.n;
  }
  F32 sum[kRegRows * kRegCells] = {};
  for (int64_t i = 0; i < d.n; i += kLanes) {
    F32 key[kRegCells];
#pragma GCC unroll 4
    for (int c = 0; c < kRegCells; ++c) key[c] = load(b[c] + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRegRows; ++r) {
      const F32 x = load(a[r] + i);
#pragma GCC unroll 4
      for (int c = 0; c < kRegCells; ++c) sum[r * kRegCells + c] += x * key[c];
    }
  }
  float result[kRegRows * kRegCells];
#pragma GCC unroll 4
  for (int i = 0; i < kRegRows * kRegCells; i += kLanes) store(result + i, reduce_each(sum + i));
  for (int64_t r = 0; r < kRegRows && row + r < d.n_rows; ++r) {
    for (int64_t c = 0; c < kRegCells && cell + c < d.n_cells; ++c) {
      d.out[(row + r) * d.out_row + cell + c] = result[r * kRegCells + c];
    }
  }
}

// Four rows stay in the first-level cache while the cells pass by.
inline void dots(const Dots& d) {
  for (int64_t row = 0; row < d.n_rows; row += kRegRows) {
    for (int64_t cell = 0; cell < d.n_cells; cell += kRegCells) dots_tile(d, row, cell);
  }
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
