// The attention kernels' table; kept apart from kernels.h, which every op includes.
// Letters: H heads, C latent, N/R/V head dims (nope, rope, value).
#pragma once

#include "backends/cpu/kernels.h"

namespace mla::cpu {

// Rows of float32 scratch are padded to the widest vector, so that no kernel has a tail to load.
static constexpr int64_t kPadFloats = 16;
static constexpr int64_t pad_floats(int64_t n) {
  return (n + kPadFloats - 1) / kPadFloats * kPadFloats;
}

// Query rows of one task in float32: 32 rows of queries (576 each) and outputs (512 each) are 139
// KiB, which with the tile below stays in a 512 KiB second-level cache, and the conversion of a
// cache row to float32 is shared by 32 rows.
static constexpr int64_t kTileRows = 32;
// The same in pairs of bf16: see kernels/attention_bf16.inc.h.
static constexpr int64_t kPairTileRows = 64;
static constexpr int64_t kMaxTileRows = 64;
// Cells converted at a time in the latent: 32 * 576 floats are 72 KiB.
static constexpr int64_t kTileCells = 32;
// Cells of a panel, in bf16 and of expanded keys stored [dim][cell]: four of the widest vectors.
static constexpr int64_t kPanelCells = 64;

// One plane of the cache, [cells, n].
struct CachePlane {
  const std::byte* data;
  int64_t row_bytes;  // stride between cells
  Format format;
  int64_t n;
};

// A sequence's cells: logical cell i lies in block (first_cell + i) / block_cells of its table.
struct CacheCells {
  CachePlane latent;
  CachePlane rope;
  const int32_t* blocks;
  int64_t block_cells;
  int64_t first_cell;
};

// Running softmax of query rows: out holds sum_s e^(score - max) * value_s so far. A row that has
// seen nothing has max -inf, sum 0 and zeros.
struct RunningRows {
  float* out;
  int64_t out_row;  // floats between rows of out
  float* max;
  float* sum;
};

// Query rows against logical cells [begin, end), in the latent: keys are the latent and rope rows,
// values the latent rows.
struct AbsorbedTile {
  CacheCells cells;
  int64_t begin, end;
  const float* q;          // [n_rows, pad(C) + pad(R)], pads are zero
  int64_t n_rows;          // <= the kernel's tile_rows
  const int64_t* visible;  // [n_rows]: row i attends to logical cells below visible[i]
  float scale;
  RunningRows rows;  // out [n_rows, pad(C)]
  void* scratch;     // the kernel's scratch_bytes, aligned to 64
};
struct AbsorbedKernel {
  void (*run)(const AbsorbedTile&) noexcept;
  int64_t (*scratch_bytes)(int64_t c, int64_t r);
  int64_t tile_rows;  // query rows of one task, at most kMaxTileRows
};

// Query rows of one head against a block of expanded keys and values.
struct ExpandedTile {
  const float* q;          // [n_rows, N + R]
  int64_t n_rows;          // <= kTileRows
  const float* keys;       // panels of kPanelCells cells: [panels][pad(N)][kPanelCells]
  const float* rope_keys;  // [panels][pad(R)][kPanelCells]
  const float* values;     // [cells, pad(V)]
  int64_t n, r, v;
  int64_t n_cells;
  const int64_t* visible;  // [n_rows], counted from the block's first cell
  float scale;
  RunningRows rows;  // out [n_rows, V]
  float* scratch;    // kTileRows * kPanelCells floats
};

// One row's partial results over n_parts runs of cells; part i is stride floats after part i - 1.
struct MergeRow {
  const float* out;  // [n_parts] rows of n
  int64_t out_stride;
  const float* max;
  const float* sum;
  int64_t stat_stride;
  int64_t n_parts;
  int64_t n;
};

// out = out * start + a b, in float32.
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

struct AttentionTable {
  // Logical cells [begin, end) as float32 rows: latent [., latent_row], rope [., rope_row], padded
  // with zeros to pad_floats.
  void (*load_cells)(const CacheCells&, int64_t begin, int64_t end, float* latent,
                     int64_t latent_row, float* rope, int64_t rope_row) noexcept;
  // out [n, out_row] = in [m, in_row] transposed; m is a multiple of kPadFloats, rows of in are
  // readable and rows of out writable up to pad_floats(n).
  void (*transpose)(const float* in, int64_t in_row, int64_t m, int64_t n, float* out,
                    int64_t out_row) noexcept;
  void (*product)(const Product&) noexcept;
  AbsorbedKernel absorbed[2];  // by Precision
  void (*expanded)(const ExpandedTile&) noexcept;
  // out [n] = the softmax-weighted values; out may be part 0 itself.
  void (*merge)(const MergeRow&, float* out) noexcept;
};

}  // namespace mla::cpu
