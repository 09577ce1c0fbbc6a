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
static constexpr int64_t kMaxQueryRows = 64;
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
// seen nothing, or scores of -inf alone, has max -inf, sum 0 and zeros.
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
  int64_t tile_rows;  // query rows of one task, at most kMaxQueryRows
};

// ---- expanded -----------------------------------------------------------------------------------
// Cells are expanded in panels of kPanelCells. How latents, keys, values and weights are stored is
// the kernels' affair; panels follow each other.
struct HeadDims {
  int64_t n, r, c, v;
};
struct ExpandedBytes {
  int64_t latent, rope, keys, values;  // of one panel; of keys and values, of one head
  int64_t weight;                      // one head's k_b or v_b, whichever is larger
  int64_t room;                        // of a thread, for any of the steps
};

// Rows of one head's weight: of `n` rows of c numbers, or `across`, of c rows of n numbers.
struct WeightRows {
  const float* rows;  // [n_rows, row_floats], padded with zeros
  int64_t row_floats;
  int64_t first, n_rows;  // first is a multiple of kPadFloats, n_rows at most that
  int64_t n, c;
  bool across;
};
// One panel of one head's keys or values.
struct ExpandTask {
  const std::byte* weight;
  const std::byte* latent;
  int64_t n_cells;  // at most kPanelCells
  int64_t n, c;
  bool values;
  std::byte* out;
  void* room;
};
// Query rows of one head against panels of its keys and values.
struct ExpandedTile {
  HeadDims dims;
  const float* q;  // [n_rows, pad(N) + pad(R)], pads are zero
  int64_t n_rows;  // <= the kernels' tile_rows
  const std::byte* keys;
  const std::byte* rope_keys;
  const std::byte* values;
  int64_t n_cells;
  const int64_t* visible;  // [n_rows], counted from the first panel's first cell
  float scale;
  RunningRows rows;  // out [n_rows, V]
  void* scratch;     // room
};
// All pointers are aligned to 64 bytes but those into the cache and the output.
struct ExpandedKernels {
  ExpandedBytes (*bytes)(const HeadDims&);
  // Logical cells [begin, end), at most one panel.
  void (*cells)(const CacheCells&, int64_t begin, int64_t end, std::byte* latent, std::byte* rope,
                void* room) noexcept;
  void (*pack)(const WeightRows&, std::byte* weight) noexcept;
  void (*expand)(const ExpandTask&) noexcept;
  void (*attend)(const ExpandedTile&) noexcept;
  int64_t tile_rows;  // query rows of one task, at most kMaxQueryRows
};

// ---- both ---------------------------------------------------------------------------------------
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

struct AttentionTable {
  AbsorbedKernel absorbed[2];   // by Precision
  ExpandedKernels expanded[2];  // by Precision
  // out [n] = the softmax-weighted values; out may be part 0 itself. NaN where all sums are 0.
  void (*merge)(const MergeRow&, float* out) noexcept;
};

}  // namespace mla::cpu
