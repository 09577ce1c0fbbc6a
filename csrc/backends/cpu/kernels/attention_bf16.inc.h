// Attention in pairs of bf16, summed in float32: the tile that both modes share, for
// attention.inc.cpp alone and for ISAs with kHasBf16Dot.
//
//   panel    kPanelCells cells. Keys [chunk][cell][kLanes] pairs of columns, a chunk being the
//            2 kLanes columns of one register; values [column / 64][cell / 2][64] pairs of cells.
//   queries  [group][pair of columns][row]; kLanes rows of queries are a group, one row a lane
//   scores   [group][cell][row] = sum over pairs of (pair of a cell, broadcast) . (pairs of rows)
//   weights  [group][cell / 2][row] pairs of cells: e^(score - max), rounded
//   out      [row][column] = out kept + sum over pairs of (weight, broadcast) . (pairs of columns)
//
// With rows in the lanes a cell's keys are used as they lie, the softmax has no sum across lanes
// and its weights come out as the operand that the second product broadcasts. A panel of 512 + 64
// columns is 72 + 64 KiB: it and 64 rows of queries (72 KiB) and outputs (128 KiB) fit a
// second-level cache of 512 KiB. A pair of columns of all cells of a block, as well as 64 columns
// of the values (8 KiB), lie within the first-level cache at distances the instructions hold.
//
// Error: queries, keys, weights and values are rounded to 8 bits of mantissa: 2^-9 of each.
#pragma once

#include "backends/cpu/attention_kernels.h"
#include "backends/cpu/simd/simd.h"

namespace mla::cpu::MLA_ISA {
namespace {

typedef uint32_t Pair;

constexpr int64_t kChunk = 2 * kLanes;  // columns of a register of pairs
constexpr int64_t kOutColumns = 64;     // columns of a block of values
constexpr int64_t kPanelPairs = kPanelCells / 2;
constexpr int64_t kPairGroups = kPairTileRows / kLanes;
// Sums in registers: 16 of 32, which keeps the unit busy (a product a cycle, 6 cycles until its sum
// may take the next) and loads at 8 to 17 per 16 products.
constexpr int kSums = 16;
constexpr int kOutVectors = kOutColumns / kLanes;
constexpr int kOutRows = kSums / kOutVectors;
static_assert(kOutColumns == 2 * kChunk);

constexpr int64_t n_chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }
constexpr int64_t key_panel_pairs(int64_t n) { return n_chunks(n) * kPanelCells * kLanes; }
constexpr int64_t value_panel_pairs(int64_t n) {
  return (n + kOutColumns - 1) / kOutColumns * kPanelPairs * kOutColumns;
}
constexpr int64_t query_pairs(int64_t n_chunks) { return n_chunks * kLanes * kPairTileRows; }

inline I32 load_pairs(const Pair* p) { return load_as<I32>(p); }
inline void store_pairs(Pair* p, I32 v) { std::memcpy(p, &v, sizeof v); }
inline I32 broadcast(const Pair* p) { return static_cast<int32_t>(*p) - I32{}; }

// ---- queries ------------------------------------------------------------------------------------
// Up to kLanes rows of n float32 (a multiple of kLanes) -> [chunks of n][kLanes pairs][kLanes
// rows].
void pack_lanes(const float* rows, int64_t row_floats, int64_t n_rows, int64_t n, Pair* out) {
  for (int64_t j = 0; j < n; j += kChunk) {
    F32 v[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const float* row = rows + i * row_floats + j;
      v[i] = i >= n_rows ? zero()
                         : (F32)join_pairs(load(row), j + kLanes < n ? load(row + kLanes) : zero());
    }
    transpose_square(v);
    for (int64_t i = 0; i < kLanes; ++i) store_pairs(out + (j / 2 + i) * kLanes, (I32)v[i]);
  }
}

// ---- queries and cells --------------------------------------------------------------------------
// kCells cells from `cell` on with kGroups groups of rows; done(cell, group, sum) takes the sums
// [kCells][kGroups].
// Keys come in parts: panels of `chunks` chunks, which the queries have one after the other.
struct KeyPart {
  const Pair* keys;
  int64_t chunks;
  const std::byte* const* next_rows;  // of the next panel's cells, to fetch meanwhile; may be null
  int64_t chunk_bytes;                // of such a row
};
struct Queries {
  const Pair* pairs;    // [groups][n_pairs][kLanes]
  int64_t group_pairs;  // n_pairs * kLanes
};

template <int kCells, int kGroups, class Done>
MLA_INLINE void cell_products(const KeyPart* parts, int n_parts, const Queries& q, int64_t cell,
                              int64_t group, const Done& done) {
  F32 sum[kCells][kGroups] = {};
  const Pair* query = q.pairs + group * q.group_pairs;
  for (int part = 0; part < n_parts; ++part) {
    const Pair* keys = parts[part].keys + cell * kLanes;
    for (int64_t chunk = 0; chunk < parts[part].chunks; ++chunk) {
      if (parts[part].next_rows != nullptr) {
        for (int c = 0; c < kCells; ++c) {
          __builtin_prefetch(parts[part].next_rows[cell + c] + chunk * parts[part].chunk_bytes, 0,
                             2);
        }
      }
      for (int64_t pair = 0; pair < kLanes; ++pair, query += kLanes) {
        I32 rows[kGroups];
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) rows[g] = load_pairs(query + g * q.group_pairs);
#pragma GCC unroll 16
        for (int c = 0; c < kCells; ++c) {
          const I32 key = broadcast(keys + c * kLanes + pair);
#pragma GCC unroll 4
          for (int g = 0; g < kGroups; ++g) sum[c][g] = dot_pairs(sum[c][g], key, rows[g]);
        }
      }
      keys += kPanelCells * kLanes;
    }
  }
  done(cell, group, sum);
}

// All cells of a panel (rounded up to kSums) with all groups.
template <class Done>
MLA_INLINE void panel_products(const KeyPart* parts, int n_parts, const Queries& q, int64_t n_cells,
                               int64_t n_groups, const Done& done) {
  int64_t g = 0;
  for (; g + 2 <= n_groups; g += 2) {
    for (int64_t cell = 0; cell < n_cells; cell += kSums / 2) {
      cell_products<kSums / 2, 2>(parts, n_parts, q, cell, g, done);
    }
  }
  if (g == n_groups) return;
  for (int64_t cell = 0; cell < n_cells; cell += kSums) {
    cell_products<kSums, 1>(parts, n_parts, q, cell, g, done);
  }
}

// ---- a tile of rows -----------------------------------------------------------------------------
// What a tile of rows carries from panel to panel, a lane for each row. Rows past the last see what
// the last one sees; nothing of theirs is kept.
struct PairRows {
  int64_t n_rows, n_groups;
  Queries q;
  float scale;
  const int64_t* visible;
  float* out;
  int64_t out_row, out_columns;
  F32 max[kPairGroups], sum[kPairGroups], kept[kPairGroups];
};

struct PairScratch {
  float* scores;  // [groups][kPanelCells][kLanes]
  Pair* weights;  // [groups][kPanelPairs][kLanes]
};
constexpr int64_t kPairScratchFloats = kPairTileRows * (kPanelCells + kPanelPairs);

inline void load_rows(const RunningRows& from, PairRows* t) {
  float lanes[2][kPairTileRows] = {};
  for (int64_t i = 0; i < t->n_rows; ++i) {
    lanes[0][i] = from.max[i];
    lanes[1][i] = from.sum[i];
  }
  for (int64_t g = 0; g < t->n_groups; ++g) {
    t->max[g] = load(lanes[0] + g * kLanes);
    t->sum[g] = load(lanes[1] + g * kLanes);
  }
  t->out = from.out;
  t->out_row = from.out_row;
}
inline void store_rows(const PairRows& t, const RunningRows& to) {
  for (int64_t i = 0; i < t.n_rows; ++i) {
    to.max[i] = t.max[i / kLanes][i % kLanes];
    to.sum[i] = t.sum[i / kLanes][i % kLanes];
  }
}

// How many of a panel's cells each row of a group sees; false if all of them see all n_cells.
inline bool seen_cells(const PairRows& t, int64_t group, int64_t first, int64_t n_cells,
                       I32* seen) {
  int32_t lane[kLanes];
  bool some_hidden = n_cells % 2 != 0;
  for (int64_t i = 0; i < kLanes; ++i) {
    const int64_t row = group * kLanes + i;
    const int64_t n = t.visible[row < t.n_rows ? row : t.n_rows - 1] - first;
    lane[i] = static_cast<int32_t>(n < 0 ? 0 : n < n_cells ? n : n_cells);
    some_hidden |= lane[i] < n_cells;
  }
  std::memcpy(seen, lane, sizeof lane);
  return some_hidden;
}

// Scores of one group -> weights against the new maximum.
inline void weigh(PairRows* t, int64_t group, int64_t first, int64_t n_cells,
                  const PairScratch& scratch) {
  constexpr float kLog2E = 1.44269504f;
  const float lowest = -__builtin_inff();
  float* score = scratch.scores + group * kPanelCells * kLanes;
  const int64_t padded = (n_cells + 1) / 2 * 2;
  const F32 scale = set1(t->scale);
  F32 best = t->max[group];
  I32 seen;
  const bool some_hidden = seen_cells(*t, group, first, n_cells, &seen);
  for (int64_t cell = 0; cell < padded; ++cell) {
    F32 z = load(score + cell * kLanes) * scale;
    if (some_hidden) z = static_cast<int32_t>(cell) < seen ? z : set1(lowest);
    store(score + cell * kLanes, z);
    best = max(z, best);
  }
  // A row that has seen nothing yet keeps the maximum -inf, and weights of 0.
  const F32 base = (best == lowest ? zero() : best) * set1(kLog2E);
  Pair* weights = scratch.weights + group * kPanelPairs * kLanes;
  // Weights are summed as they are used, rounded: what remains of their errors has mean zero.
  const I32 ones = zip_pairs(set1(1.0f), set1(1.0f));
  F32 total = zero();
  for (int64_t cell = 0; cell < padded; cell += 2) {
    const F32 even = exp2_near(load(score + cell * kLanes) * set1(kLog2E) - base);
    const F32 odd = exp2_near(load(score + (cell + 1) * kLanes) * set1(kLog2E) - base);
    const I32 pair = zip_pairs(even, odd);
    total = dot_pairs(total, pair, ones);
    store_pairs(weights + cell / 2 * kLanes, pair);
  }
  t->kept[group] = exp2_near(t->max[group] * set1(kLog2E) - base);
  t->sum[group] = t->sum[group] * t->kept[group] + total;
  t->max[group] = best;
}

// kOutRows rows from `row` on, columns [column, column + cols) of out; values: that block of
// columns.
inline void add_values(const PairRows& t, const Pair* values, int64_t n_pairs, int64_t row,
                       int64_t column, int64_t cols, const Pair* weights) {
  F32 sum[kOutRows][kOutVectors];
  const int64_t group = row / kLanes;
  const Pair* weight = weights + group * kPanelPairs * kLanes + row % kLanes;
  float* out[kOutRows];
  for (int r = 0; r < kOutRows; ++r) {
    out[r] = t.out + (row + r < t.n_rows ? row + r : t.n_rows - 1) * t.out_row + column;
    const F32 kept = set1(t.kept[group][(row + r < t.n_rows ? row + r : t.n_rows - 1) % kLanes]);
#pragma GCC unroll 4
    for (int v = 0; v < kOutVectors; ++v) {
      sum[r][v] = load_count(out[r] + v * kLanes, cols - v * kLanes) * kept;
    }
  }
  for (int64_t pair = 0; pair < n_pairs; ++pair, values += kOutColumns, weight += kLanes) {
    I32 columns[kOutVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kOutVectors; ++v) columns[v] = load_pairs(values + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kOutRows; ++r) {
      const I32 x = broadcast(weight + r);
#pragma GCC unroll 4
      for (int v = 0; v < kOutVectors; ++v) sum[r][v] = dot_pairs(sum[r][v], x, columns[v]);
    }
  }
  for (int r = 0; r < kOutRows && row + r < t.n_rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kOutVectors; ++v) {
      store_count(out[r] + v * kLanes, cols - v * kLanes, sum[r][v]);
    }
  }
}

// One panel of cells, of which the first is `first` as `visible` counts.
void attend_panel(PairRows* t, const KeyPart* parts, int n_parts, const Pair* values, int64_t first,
                  int64_t n_cells, const PairScratch& scratch) {
  panel_products(
      parts, n_parts, t->q, n_cells, t->n_groups,
      [&]<int kCells, int kGroups>(int64_t cell, int64_t group, const F32(&sum)[kCells][kGroups]) {
        float* scores = scratch.scores + (group * kPanelCells + cell) * kLanes;
#pragma GCC unroll 16
        for (int i = 0; i < kCells * kGroups; ++i) {
          store(scores + (i % kGroups * kPanelCells + i / kGroups) * kLanes,
                sum[i / kGroups][i % kGroups]);
        }
      });
  for (int64_t g = 0; g < t->n_groups; ++g) weigh(t, g, first, n_cells, scratch);
  const int64_t n_pairs = (n_cells + 1) / 2;
  for (int64_t column = 0; column < t->out_columns; column += kOutColumns) {
    for (int64_t row = 0; row < t->n_rows; row += kOutRows) {
      add_values(*t, values + column * kPanelPairs, n_pairs, row, column, t->out_columns - column,
                 scratch.weights);
    }
  }
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
