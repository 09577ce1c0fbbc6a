// The products of attention in pairs of bf16 by vectors: see attention_bf16.inc.h, for
// attention.inc.cpp alone.
#pragma once

#include "backends/cpu/kernels/attention_bf16.inc.h"

namespace mla::cpu::MLA_ISA {
namespace {

struct PairUnit {};

// Sums in registers: 16 of 32, which keeps the unit busy (a product a cycle, 6 cycles until its sum
// may take the next) and loads at 8 to 17 per 16 products.
constexpr int kSums = 16;
constexpr int64_t kCellBlock = kSums;
constexpr int kOutRows = kSums / kOutVectors;

template <int kCells, int kGroups, class Done>
MLA_INLINE void cell_products(const KeyPart* parts, int n_parts, const Queries& q, int64_t cell,
                              int64_t group, const Done& done) {
  F32 sum[kCells][kGroups] = {};
  const Pair* query = q.pairs + group * q.group_pairs;
  for (int part = 0; part < n_parts; ++part) {
    const Pair* keys = parts[part].keys + cell * kLanes;
    for (int64_t chunk = 0; chunk < parts[part].chunks; ++chunk) {
      fetch_chunk(parts[part], cell, kCells, chunk);
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

template <class Done>
MLA_INLINE void panel_products(PairUnit&, const KeyPart* parts, int n_parts, const Queries& q,
                               int64_t n_cells, int64_t n_groups, const Done& done) {
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

void panel_scores(PairUnit& unit, const KeyPart* parts, int n_parts, const Queries& q,
                  int64_t n_cells, int64_t n_groups, float* scores) {
  panel_products(
      unit, parts, n_parts, q, n_cells, n_groups,
      [&]<int kCells, int kGroups>(int64_t cell, int64_t group, const F32(&sum)[kCells][kGroups]) {
        float* to = scores + (group * kPanelCells + cell) * kLanes;
#pragma GCC unroll 16
        for (int i = 0; i < kCells * kGroups; ++i) {
          store(to + (i % kGroups * kPanelCells + i / kGroups) * kLanes,
                sum[i / kGroups][i % kGroups]);
        }
      });
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

void add_panel_values(PairUnit&, const PairRows& t, const Pair* values, int64_t n_cells,
                      const Pair* weights) {
  const int64_t n_pairs = (n_cells + 1) / 2;
  for (int64_t column = 0; column < t.out_columns; column += kOutColumns) {
    for (int64_t row = 0; row < t.n_rows; row += kOutRows) {
      add_values(t, values + column * kPanelPairs, n_pairs, row, column, t.out_columns - column,
                 weights);
    }
  }
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
