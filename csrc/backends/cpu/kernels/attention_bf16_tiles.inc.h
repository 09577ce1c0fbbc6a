// The products of attention in pairs of bf16 by tiles of matrices: see attention_bf16.inc.h, for
// attention.inc.cpp alone. A panel's keys are tiles of 16 cells by one chunk, queries of 16 pairs
// by one group; weights are turned into tiles of 16 rows by 32 cells, which meet tiles of 16 pairs
// of cells by 16 columns of the values. All tiles have 16 rows.
#pragma once

#include "backends/cpu/kernels/attention_bf16.inc.h"
#include "backends/cpu/simd/amx.h"

namespace mla::cpu::MLA_ISA {
namespace {

constexpr int64_t kTile = 16;  // rows of a tile, and numbers or pairs of a row
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileFloats = kTile * kTile;
constexpr int64_t kCellBlock = 2 * kTile;  // the pairs of cells that a tile of values has
static_assert(kTile == kLanes && kPanelCells == 2 * kCellBlock);

struct PairUnit {
  Tiles tiles;
  PairUnit() { tiles.shape(kTile, kTile); }
};

// ---- cells with queries -------------------------------------------------------------------------
// Four sums keep the unit busy (a product takes 16 cycles, its sum is ready after 52): 32 cells
// with two groups, sum 2 i + j of block i and group j, or 64 cells with one, sum i of block i.
template <int kGroups>
inline void tile_sums(Tiles& tiles, const KeyPart* parts, int n_parts, const Queries& q,
                      int64_t cell, int64_t group, bool four_blocks) {
  const Pair* query = q.pairs + group * q.group_pairs;
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  for (int part = 0; part < n_parts; ++part) {
    const Pair* keys = parts[part].keys + cell * kLanes;
    for (int64_t chunk = 0; chunk < parts[part].chunks; ++chunk, query += kTileFloats) {
      fetch_chunk(parts[part], cell, four_blocks ? 4 * kTile : 2 * kTile, chunk);
      tiles.load<6>(query, kTileRowBytes);
      tiles.load<4>(keys, kTileRowBytes);
      tiles.load<5>(keys + kTileFloats, kTileRowBytes);
      if constexpr (kGroups == 2) {
        tiles.load<7>(query + q.group_pairs, kTileRowBytes);
        tiles.multiply<0, 4, 6>();
        tiles.multiply<1, 4, 7>();
        tiles.multiply<2, 5, 6>();
        tiles.multiply<3, 5, 7>();
      } else {
        tiles.multiply<0, 4, 6>();
        tiles.multiply<1, 5, 6>();
        if (four_blocks) {
          tiles.load<4>(keys + 2 * kTileFloats, kTileRowBytes);
          tiles.load<5>(keys + 3 * kTileFloats, kTileRowBytes);
          tiles.multiply<2, 4, 6>();
          tiles.multiply<3, 5, 6>();
        }
      }
      keys += kPanelCells * kLanes;
    }
  }
}

// take(cell, group, group count, blocks) finds the sums in tiles 0 to 3.
template <class Take>
inline void tile_products(Tiles& tiles, const KeyPart* parts, int n_parts, const Queries& q,
                          int64_t n_cells, int64_t n_groups, const Take& take) {
  int64_t g = 0;
  for (; g + 2 <= n_groups; g += 2) {
    for (int64_t cell = 0; cell < n_cells; cell += kCellBlock) {
      tile_sums<2>(tiles, parts, n_parts, q, cell, g, false);
      take(cell, g, 2, 2);
    }
  }
  if (g == n_groups) return;
  const bool four_blocks = n_cells > kCellBlock;
  tile_sums<1>(tiles, parts, n_parts, q, 0, g, four_blocks);
  take(int64_t{0}, g, 1, four_blocks ? 4 : 2);
}

void panel_scores(PairUnit& unit, const KeyPart* parts, int n_parts, const Queries& q,
                  int64_t n_cells, int64_t n_groups, float* scores) {
  Tiles& tiles = unit.tiles;
  const auto take = [&](int64_t cell, int64_t group, int groups, int blocks) {
    float* to = scores + (group * kPanelCells + cell) * kLanes;
    float* second = to + kTileFloats;
    float* third = groups == 2 ? to + kPanelCells * kLanes : to + 2 * kTileFloats;
    tiles.store<0>(to, kTileRowBytes);
    if (groups == 2) {
      tiles.store<2>(second, kTileRowBytes);
      tiles.store<1>(third, kTileRowBytes);
      tiles.store<3>(third + kTileFloats, kTileRowBytes);
      return;
    }
    tiles.store<1>(second, kTileRowBytes);
    if (blocks < 4) return;
    tiles.store<2>(third, kTileRowBytes);
    tiles.store<3>(third + kTileFloats, kTileRowBytes);
  };
  tile_products(tiles, parts, n_parts, q, n_cells, n_groups, take);
}

// Done takes sums in registers: they pass through memory here, kCells cells at a time.
template <class Done>
inline void panel_products(PairUnit& unit, const KeyPart* parts, int n_parts, const Queries& q,
                           int64_t n_cells, int64_t n_groups, const Done& done) {
  constexpr int kCells = 8;
  Tiles& tiles = unit.tiles;
  alignas(64) float sums[4][kTileFloats];
  const auto take = [&](int64_t cell, int64_t group, int groups, int blocks) {
    tiles.store<0>(sums[0], kTileRowBytes);
    tiles.store<1>(sums[1], kTileRowBytes);
    tiles.store<2>(sums[2], kTileRowBytes);
    tiles.store<3>(sums[3], kTileRowBytes);
    for (int64_t i = 0; i < blocks * kTile; i += kCells) {
      const float* from = sums[i / kTile * groups] + i % kTile * kLanes;
      F32 pair[kCells][2], single[kCells][1];
      for (int c = 0; c < kCells; ++c) {
        pair[c][0] = single[c][0] = load(from + c * kLanes);
        if (groups == 2) pair[c][1] = load(from + kTileFloats + c * kLanes);
      }
      if (groups == 2) {
        done(cell + i, group, pair);
      } else {
        done(cell + i, group, single);
      }
    }
  };
  tile_products(tiles, parts, n_parts, q, n_cells, n_groups, take);
}

// ---- weights with values ------------------------------------------------------------------------
// One group's weights [pair][row] of n_pairs pairs -> two tiles [row][16 pairs], zeros behind them.
inline void turn_weights(const Pair* weights, int64_t n_pairs, Pair* out) {
  for (int64_t first = 0; first < kPanelPairs; first += kTile, out += kTileFloats) {
    F32 v[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      v[i] = first + i < n_pairs ? load_as<F32>(weights + (first + i) * kLanes) : zero();
    }
    transpose_square(v);
    for (int64_t i = 0; i < kLanes; ++i) store_pairs(out + i * kLanes, (I32)v[i]);
  }
}

inline void scale_rows(const PairRows& t, int64_t group) {
  bool all_kept = true;
  for (int64_t i = 0; i < kLanes; ++i) all_kept &= t.kept[group][i] == 1.0f;
  if (all_kept) return;
  for (int64_t i = group * kLanes; i < t.n_rows && i < (group + 1) * kLanes; ++i) {
    const F32 kept = set1(t.kept[group][i % kLanes]);
    float* out = t.out + i * t.out_row;
    for (int64_t j = 0; j < t.out_columns; j += kLanes) {
      store_count(out + j, t.out_columns - j, load_count(out + j, t.out_columns - j) * kept);
    }
  }
}

// Four tiles of sums, 64 columns of a group, with the weights in tiles 4 and 5.
template <int tile>
inline void add_tile(Tiles& tiles, const Pair* values, float* out, int64_t row_bytes, bool second) {
  constexpr int64_t kValueBytes = kOutColumns * int64_t{sizeof(Pair)};
  tiles.load<tile>(out + tile * kTile, row_bytes);
  tiles.load<6>(values + tile * kTile, kValueBytes);
  tiles.multiply<tile, 4, 6>();
  if (second) {
    tiles.load<7>(values + kTile * kOutColumns + tile * kTile, kValueBytes);
    tiles.multiply<tile, 5, 7>();
  }
}
inline void add_tiles(Tiles& tiles, const Pair* values, float* out, int64_t row_bytes,
                      bool second) {
  add_tile<0>(tiles, values, out, row_bytes, second);
  add_tile<1>(tiles, values, out, row_bytes, second);
  add_tile<2>(tiles, values, out, row_bytes, second);
  add_tile<3>(tiles, values, out, row_bytes, second);
  tiles.store<0>(out, row_bytes);
  tiles.store<1>(out + kTile, row_bytes);
  tiles.store<2>(out + 2 * kTile, row_bytes);
  tiles.store<3>(out + 3 * kTile, row_bytes);
}

void add_panel_values(PairUnit& unit, const PairRows& t, const Pair* values, int64_t n_cells,
                      const Pair* weights) {
  Tiles& tiles = unit.tiles;
  alignas(64) Pair turned[2 * kTileFloats];
  alignas(64) float whole[kTile * kOutColumns] = {};  // where rows or columns are missing
  const bool second = n_cells > kCellBlock;
  for (int64_t g = 0; g < t.n_groups; ++g) {
    scale_rows(t, g);
    turn_weights(weights + g * kPanelPairs * kLanes, (n_cells + 1) / 2, turned);
    tiles.load<4>(turned, kTileRowBytes);
    tiles.load<5>(turned + kTileFloats, kTileRowBytes);
    const int64_t n_rows = t.n_rows - g * kTile < kTile ? t.n_rows - g * kTile : kTile;
    for (int64_t column = 0; column < t.out_columns; column += kOutColumns) {
      float* out = t.out + g * kTile * t.out_row + column;
      const Pair* block = values + column * kPanelPairs;
      const int64_t cols = t.out_columns - column;
      if (n_rows == kTile && cols >= kOutColumns) {
        add_tiles(tiles, block, out, t.out_row * int64_t{sizeof(float)}, second);
        continue;
      }
      const int64_t n = cols < kOutColumns ? cols : kOutColumns;
      const auto n_bytes = static_cast<size_t>(n) * sizeof(float);
      for (int64_t i = 0; i < n_rows; ++i) {
        std::memcpy(whole + i * kOutColumns, out + i * t.out_row, n_bytes);
      }
      add_tiles(tiles, block, whole, kOutColumns * int64_t{sizeof(float)}, second);
      for (int64_t i = 0; i < n_rows; ++i) {
        std::memcpy(out + i * t.out_row, whole + i * kOutColumns, n_bytes);
      }
    }
  }
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
