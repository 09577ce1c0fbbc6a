// What matmul, matmul_indexed and swiglu_matmul share: how a weight is read, packed activations,
// tiles of rows grouped by expert.
//
// A product runs in two phases: rows of x are packed, then tiles of (rows of w) x (rows of x) are
// computed. An element of the result is one kernel call's work whatever the tiles, so results do
// not depend on how they are cut.
#pragma once

#include "backends/cpu/ops/carver.h"
#include "backends/cpu/ops/ops.h"
#include "backends/cpu/ops/parts.h"

namespace mla::cpu {

// Rows of x per tile: each row of w is read once for all of them, and a slab of w unpacked once.
inline constexpr int64_t kMaxTileRows = kSlabMaxRows;

// How the kernels read one matrix w [N, K] (transposed: [K, N]).
enum class Reading : uint8_t {
  rows,     // its rows hold K
  across,   // its rows hold N
  gathered  // floats with strides in both dims: some rows at a time are copied to scratch
};
struct WeightReader {
  Reading reading;
  Format format;
  int64_t n, k;
  int64_t n_stride, k_stride;  // bytes; of quantized weights only the one between rows counts
  // The kernel, null where there is none, and what it wants.
  MatmulKernel kernel = nullptr;
  PackRow pack = nullptr;  // x as it takes it
  int64_t packed_row_bytes = 0;
  bool takes_floats = false;  // packed rows are float32
  bool many_rows = false;     // unpacks w once for all rows of a tile
  int64_t granule = 16;       // chunks of N begin at multiples of this
  int64_t room_bytes = 0;     // scratch of each thread

  // n_rows: how many rows of x meet w, or an expert of it on average. The kernel, and with it how
  // x is rounded, depends on whether these are few or many.
  static WeightReader plan(const Layout& w, const MatmulAttrs& attrs, const KernelTable& kernels,
                           int64_t n_rows);
  // From n on, as a matrix of its own. Not for quantized weights read across.
  const std::byte* skip(const std::byte* w, int64_t n) const { return w + n * n_stride; }
};

// Rows of x that meet one matrix, and where their results go: y[i][n].
struct RowTile {
  const std::byte* const* x;
  float* const* y;
  int64_t n_rows;  // <= kMaxTileRows
};
// Rows [begin, end) of matrix (i0, i1) of a weight.
struct WeightRange {
  int64_t i0, i1;
  int64_t begin, end;
};
// y[i][n - y_begin] (+)= x[i] . w[n] for the n of the range; y_begin is 0 or range.begin.
void multiply(const CpuRun& run, int thread, const WeightReader& reader, const Tensor& w,
              const WeightRange& range, const RowTile& tile, int64_t y_begin, bool accumulate,
              std::byte* room);

// The rows of x [.., M, K] as a reader wants them; rows that a stride of 0 repeats are packed
// once, float32 rows that lie right are used in place.
class PackedRows {
 public:
  PackedRows(const Layout& x, const WeightReader& reader, Carver& carver);
  void pack(const Tensor& x, const CpuRun& run);  // fills the scratch, in parallel
  const std::byte* row(int64_t i0, int64_t i1, int64_t i2) const;

 private:
  PackRow pack_row_;
  int64_t row_bytes_;
  int64_t extent_[3];  // of distinct rows
  int64_t step_[3];    // bytes between rows; 0 where rows repeat
  bool in_place_;
  const std::byte* base_;
  std::byte* scratch_ = nullptr;
};

// How to cut n_rows rows of x. Where each row of w is read again for a few rows of x, the tile
// stays in half of a 1 MiB second-level cache; else tiles are as large as keeps all threads busy.
int64_t tile_rows(const WeightReader& reader, int64_t n_rows, int n_threads);
// Rows per tile where experts decide how many there are.
int64_t expert_tile_rows(const WeightReader& reader);

// How to cut N: chunks that keep all threads busy, none worth less than the hand-over costs, none
// above max_rows.
sys::RowSplit split_columns(const WeightReader& reader, int64_t rows_per_tile, int n_threads,
                            int64_t max_rows);
// The same chunks, each on the node that has these rows of w.
sys::NodeSplit columns_on_nodes(const WeightReader& reader, const Tensor& w,
                                const sys::RowSplit& columns);

// (token, slot) pairs ordered by expert (within one: by token, then slot), and cut into tiles that
// meet one expert each.
struct ExpertTiles {
  struct Tile {
    int64_t expert;
    int64_t first;  // position in `pairs`
    int64_t n_pairs;
  };
  int64_t n_tokens, n_slots, n_experts;
  int64_t* pairs;   // [n_tokens * n_slots]: token * n_slots + slot
  int64_t* starts;  // [n_experts + 1]
  Tile* tiles;      // at most one per pair
  int64_t n_tiles = 0;

  ExpertTiles(const Layout& ids, int64_t n_experts, Carver& carver);
  // Throws ShapeError for an id outside [0, n_experts).
  void group(const Tensor& ids, int64_t rows_per_tile, const char* op);
};

inline float read_f32(const Tensor& x, int64_t i2, int64_t i3) {
  return *reinterpret_cast<const float*>(x.data + i2 * x.stride[2] + i3 * x.stride[3]);
}

}  // namespace mla::cpu
