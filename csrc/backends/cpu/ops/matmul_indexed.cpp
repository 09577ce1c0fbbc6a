// y[t, a, n] = sum_k x[t, a or 0, k] w[ids[t, a], n, k]; with weights, their sum over a
// (+ residual[t, n]).
//
// Pairs (t, a) are grouped by expert, so that a row of w is read once for all its tokens. For the
// sum, every pair's product is kept until all are there, for some columns at a time, and added in
// the order of a.
#include <algorithm>

#include "backends/cpu/ops/parts.h"
#include "backends/cpu/ops/products.h"
#include "backends/cpu/ops/rows.h"

namespace mla::cpu {
namespace {

// Products waiting to be summed, which stay in the last-level cache: 512 tokens with 8 experts get
// 512 columns at a time.
constexpr int64_t kPartialBytes = 8 * 1024 * 1024;

// Rows of x that an expert of w meets on average.
int64_t rows_of_expert(const Layout& ids, const Layout& w) {
  return ids.shape.extent[2] * ids.shape.extent[3] / std::max<int64_t>(w.shape.extent[1], 1);
}

struct Indexed {
  WeightReader reader;
  PackedRows rows;
  ExpertTiles tiles;
  int64_t rows_per_tile;
  int64_t block;  // columns computed between two sums
  float* partial = nullptr;
  sys::RowSplit columns;  // of one block
  std::byte* room;

  Indexed(const Layout& x, const Layout& w, const Layout& ids, bool summed,
          const MatmulAttrs& attrs, const KernelTable& kernels, int n_threads, Carver& carver)
      : reader(WeightReader::plan(w, attrs, kernels, rows_of_expert(ids, w))),
        rows(x, reader, carver),
        tiles(ids, w.shape.extent[1], carver),
        rows_per_tile(expert_tile_rows(reader)),
        block(reader.n) {
    const int64_t n_pairs = tiles.n_tokens * tiles.n_slots;
    if (summed && n_pairs > 0) {
      const int64_t fit = kPartialBytes / static_cast<int64_t>(sizeof(float)) / n_pairs;
      block = std::min(reader.n, std::max<int64_t>(fit / kAcrossColumns, 1) * kAcrossColumns);
      partial = carver.take<float>(n_pairs * block);
    }
    const int64_t likely_rows = std::min(rows_per_tile, rows_of_expert(ids, w) + 1);
    columns = split_columns(reader, likely_rows, n_threads, block);
    room = carver.take<std::byte>(n_threads * reader.room_bytes);
  }
};

Indexed plan(const Layout& x, const Layout& w, const Layout& ids, bool summed,
             const MatmulAttrs& attrs, const KernelTable& kernels, int n_threads, Carver& carver) {
  return Indexed(x, w, ids, summed, attrs, kernels, n_threads, carver);
}

// Columns [begin, end) of one tile, to `partial` (from column `block_begin` on) or the result.
void run_tile(const Indexed& op, const Step& step, const ExpertTiles::Tile& tile,
              int64_t block_begin, int64_t begin, int64_t end, int thread) {
  const bool one_row = step.in[0].shape.extent[2] == 1;
  const std::byte* x[kMaxTileRows];
  float* y[kMaxTileRows];
  for (int64_t r = 0; r < tile.n_pairs; ++r) {
    const int64_t pair = op.tiles.pairs[tile.first + r];
    const int64_t t = pair / op.tiles.n_slots;
    const int64_t a = pair % op.tiles.n_slots;
    x[r] = op.rows.row(0, t, one_row ? 0 : a);
    y[r] = op.partial != nullptr ? op.partial + pair * op.block + (begin - block_begin)
                                 : reinterpret_cast<float*>(step.out.at(0, t, a)) + begin;
  }
  std::byte* room = op.room + thread * op.reader.room_bytes;
  for_runs(step.in[1], 0, tile.expert, begin, end,
           [&](const std::byte* base, int64_t first, int64_t last) {
             multiply(op.reader, op.reader.skip(base, begin), first - begin, last - begin,
                      {x, y, tile.n_pairs}, false, room);
           });
}

// out[t, n] = sum_a weights[t, a] partial[t, a, n] (+ residual[t, n]) for n in [begin, end).
void sum_slots(const Indexed& op, const Step& step, int64_t t, int64_t block_begin, int64_t begin,
               int64_t end) {
  const Tensor& weights = step.in[3];
  const Tensor& residual = step.in[4];
  float* y = reinterpret_cast<float*>(step.out.at(0, 0, t));
  std::fill(y + begin, y + end, 0.0f);
  for (int64_t a = 0; a < op.tiles.n_slots; ++a) {
    const float weight = read_f32(weights, t, a);
    const float* row = op.partial + (t * op.tiles.n_slots + a) * op.block - block_begin;
    for (int64_t n = begin; n < end; ++n) y[n] += weight * row[n];
  }
  if (residual.data == nullptr) return;
  for (int64_t n = begin; n < end; ++n) y[n] += read_f32(residual, t, n);
}

void run_sums(const Indexed& op, const Step& step, const CpuRun& run, int64_t block_begin,
              int64_t block_end) {
  constexpr int64_t kPiece = 1024;
  const int64_t pieces = (block_end - block_begin + kPiece - 1) / kPiece;
  const int64_t bytes = static_cast<int64_t>(sizeof(float)) * kPiece * (op.tiles.n_slots + 2);
  for_items(run, op.tiles.n_tokens * pieces, bytes, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = block_begin + i % pieces * kPiece;
      sum_slots(op, step, i / pieces, block_begin, begin, std::min(begin + kPiece, block_end));
    }
  });
}

bool supports_indexed(const Node& node, const KernelTable& kernels) {
  const Layout& w = node.input(1)->layout;
  const int64_t n_rows = rows_of_expert(node.input(2)->layout, w);
  return WeightReader::plan(w, node.attr<MatmulAttrs>(), kernels, n_rows).kernel != nullptr;
}

size_t indexed_scratch(const Node& node, const KernelTable& kernels, int n_threads) {
  Carver carver(nullptr);
  plan(node.input(0)->layout, node.input(1)->layout, node.input(2)->layout,
       node.input(3) != nullptr, node.attr<MatmulAttrs>(), kernels, n_threads, carver);
  return carver.used_bytes();
}

void run_indexed(const Step& step, const CpuRun& run) {
  const bool summed = step.in[3].data != nullptr;
  Carver carver(run.scratch);
  Indexed op = plan(step.in[0], step.in[1], step.in[2], summed, step.node->attr<MatmulAttrs>(),
                    run.kernels, run.pool.n_threads(), carver);
  op.tiles.group(step.in[2], op.rows_per_tile, "matmul_indexed");
  op.rows.pack(step.in[0], run);
  for (int64_t block_begin = 0; block_begin < op.reader.n; block_begin += op.block) {
    run.checkpoint();
    const int64_t block_end = std::min(block_begin + op.block, op.reader.n);
    sys::RowSplit columns = op.columns;
    columns.n_rows = block_end - block_begin;
    run.pool.parallel_for(op.tiles.n_tiles * columns.n_chunks(), [&](int64_t chunk, int thread) {
      const int64_t piece = chunk % columns.n_chunks();
      run_tile(op, step, op.tiles.tiles[chunk / columns.n_chunks()], block_begin,
               block_begin + columns.begin(piece), block_begin + columns.end(piece), thread);
    });
    if (summed) run_sums(op, step, run, block_begin, block_end);
  }
}

}  // namespace

const CpuOp matmul_indexed_op = {supports_indexed, indexed_scratch, run_indexed};

}  // namespace mla::cpu
