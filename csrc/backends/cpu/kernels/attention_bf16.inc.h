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
// The two products are attention_bf16_vectors.inc.h or, where there are tiles of matrices,
// attention_bf16_tiles.inc.h; each has
//   PairUnit          what the products need while a task runs
//   kCellBlock        cells are computed in blocks of so many; what is missing is zeros
//   panel_products    cells with groups of rows: done(cell, group, sums [kCells][kGroups])
//   panel_scores      the same, stored as scores
//   add_panel_values
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
constexpr int kOutVectors = kOutColumns / kLanes;
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

// ---- rows of queries ----------------------------------------------------------------------------
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

// Asks for a chunk of the next panel's cells [cell, cell + n).
inline void fetch_chunk(const KeyPart& part, int64_t cell, int64_t n, int64_t chunk) {
  if (part.next_rows == nullptr) return;
  for (int64_t i = cell; i < cell + n; ++i) {
    __builtin_prefetch(part.next_rows[i] + chunk * part.chunk_bytes, 0, 2);
  }
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
