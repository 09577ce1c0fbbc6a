// y[t, a, n] = sum_k x[t, a or 0, k] w[ids[t, a], n, k]; with weights, their sum over a
// (+ residual[t, n]).
//
// Pairs (t, a) are grouped by expert, so that a row of w is read once for all its tokens. For the
// sum, every pair's product is kept until all are there, for some columns at a time, and added in
// the order of a.
#include <algorithm>
#include <array>
#include <span>
#include <utility>

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
  int64_t block;      // columns computed between two sums
  int64_t block_row;  // room for them: every part may take some more, to end at a granule
  float* partial = nullptr;
  sys::RowSplit columns;  // of one block
  std::byte* room;

  // n_parts: those that w is kept in, each on a node with a cache of its own.
  Indexed(const Layout& x, const Layout& w, const Layout& ids, bool summed, int64_t n_parts,
          const MatmulAttrs& attrs, const KernelTable& kernels, int n_threads, Carver& carver)
      : reader(WeightReader::plan(w, attrs, kernels, rows_of_expert(ids, w))),
        rows(x, reader, carver),
        tiles(ids, w.shape.extent[1], carver),
        rows_per_tile(expert_tile_rows(reader)),
        block(reader.n),
        block_row(reader.n) {
    const int64_t n_pairs = tiles.n_tokens * tiles.n_slots;
    if (summed && n_pairs > 0) {
      const int64_t fit = kPartialBytes / static_cast<int64_t>(sizeof(float)) / n_pairs;
      const int64_t of_part = std::max<int64_t>(fit / kAcrossColumns, 1) * kAcrossColumns;
      block = std::min(reader.n, n_parts * of_part);
      block_row = block + (n_parts > 1 ? n_parts * reader.granule : 0);
      partial = carver.take<float>(n_pairs * block_row);
    }
    const int64_t likely_rows = std::min(rows_per_tile, rows_of_expert(ids, w) + 1);
    columns = split_columns(reader, likely_rows, n_threads, block);
    room = carver.take<std::byte>(n_threads * reader.room_bytes);
  }
};

// Columns computed between two sums: some of every part of w, so that all nodes are at work. They
// are numbered through, from 0 on.
struct Block {
  sys::NodeSplit columns;
  std::array<int64_t, sys::kMaxNodes> first = {};  // of each part: column of w that its first is

  // Column of w that is the first of a chunk.
  int64_t begin(int64_t chunk) const {
    const size_t part = columns.node_of(chunk);
    return first[part] + columns.begin(chunk) - columns.rows[part];
  }
};

// The columns of a part [begin, end) that a round covers, `width` in each.
std::pair<int64_t, int64_t> round_of(int64_t begin, int64_t end, int64_t width, int64_t round) {
  const int64_t first = std::min(begin + round * width, end);
  return {first, std::min(first + width, end)};
}

// Of a part of n columns, as many as make its share of a block.
int64_t part_width(const Indexed& op, int64_t n) {
  if (op.block == op.reader.n) return n;
  const int64_t share = op.block * n / std::max<int64_t>(op.reader.n, 1);
  return std::max(share / op.reader.granule, int64_t{1}) * op.reader.granule;
}

// An empty one where no columns are left.
Block block_of(const Indexed& op, std::span<const int64_t> parts, int64_t round) {
  std::array<int64_t, sys::kMaxNodes + 1> begins = {};
  Block block;
  const size_t n_parts = parts.size() - 1;
  for (size_t i = 0; i < n_parts; ++i) {
    // One part takes the whole block, which need not be a multiple of the granule.
    const int64_t width = n_parts == 1 ? op.block : part_width(op, parts[i + 1] - parts[i]);
    const auto [first, last] = round_of(parts[i], parts[i + 1], width, round);
    block.first[i] = first;
    begins[i + 1] = begins[i] + last - first;
  }
  block.columns =
      sys::split_on_nodes(std::span(begins).first(n_parts + 1), op.columns.rows_per_chunk);
  return block;
}

// One chunk of a block's columns of one tile, to `partial` or the result.
void run_tile(const Indexed& op, const Step& step, const CpuRun& run, const Block& block,
              const ExpertTiles::Tile& tile, int64_t chunk, int thread) {
  const int64_t begin = block.begin(chunk);
  const int64_t in_block = block.columns.begin(chunk);
  const int64_t end = begin + block.columns.end(chunk) - in_block;
  const bool one_row = step.in[0].shape.extent[2] == 1;
  const std::byte* x[kMaxTileRows];
  float* y[kMaxTileRows];
  for (int64_t r = 0; r < tile.n_pairs; ++r) {
    const int64_t pair = op.tiles.pairs[tile.first + r];
    const int64_t t = pair / op.tiles.n_slots;
    const int64_t a = pair % op.tiles.n_slots;
    x[r] = op.rows.row(0, t, one_row ? 0 : a);
    y[r] = op.partial != nullptr ? op.partial + pair * op.block_row + in_block
                                 : reinterpret_cast<float*>(step.out.at(0, t, a)) + begin;
  }
  multiply(run, thread, op.reader, step.in[1], {0, tile.expert, begin, end}, {x, y, tile.n_pairs},
           begin, false, op.room + thread * op.reader.room_bytes);
}

// out[t, n] = sum_a weights[t, a] partial[t, a, n] (+ residual[t, n]) for n in [begin, end), of
// which the first is column in_block of the block.
void sum_slots(const Indexed& op, const Step& step, int64_t t, int64_t in_block, int64_t begin,
               int64_t end) {
  const Tensor& weights = step.in[3];
  const Tensor& residual = step.in[4];
  float* y = reinterpret_cast<float*>(step.out.at(0, 0, t));
  std::fill(y + begin, y + end, 0.0f);
  for (int64_t a = 0; a < op.tiles.n_slots; ++a) {
    const float weight = read_f32(weights, t, a);
    const float* row = op.partial + (t * op.tiles.n_slots + a) * op.block_row + in_block - begin;
    for (int64_t n = begin; n < end; ++n) y[n] += weight * row[n];
  }
  if (residual.data == nullptr) return;
  for (int64_t n = begin; n < end; ++n) y[n] += read_f32(residual, t, n);
}

void run_sums(const Indexed& op, const Step& step, const CpuRun& run, const Block& block) {
  constexpr int64_t kPiece = 1024;
  Block sums = block;
  const size_t n_begins = static_cast<size_t>(block.columns.n_nodes) + 1;
  sums.columns = sys::split_on_nodes(std::span(block.columns.rows).first(n_begins), kPiece);
  const int64_t pieces = sums.columns.n_chunks();
  const int64_t bytes = static_cast<int64_t>(sizeof(float)) * kPiece * (op.tiles.n_slots + 2);
  for_items(run, op.tiles.n_tokens * pieces, bytes, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t piece = i % pieces;
      const int64_t begin = sums.begin(piece);
      const int64_t in_block = sums.columns.begin(piece);
      sum_slots(op, step, i / pieces, in_block, begin, begin + sums.columns.end(piece) - in_block);
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
  Indexed(node.input(0)->layout, node.input(1)->layout, node.input(2)->layout,
          node.input(3) != nullptr, n_parts(root_of(node.input(1)).node->slices),
          node.attr<MatmulAttrs>(), kernels, n_threads, carver);
  return carver.used_bytes();
}

void run_indexed(const Step& step, const CpuRun& run) {
  const bool summed = step.in[3].data != nullptr;
  Carver carver(run.scratch);
  Indexed op(step.in[0], step.in[1], step.in[2], summed, n_parts(step.in[1].slices),
             step.node->attr<MatmulAttrs>(), run.kernels, run.pool.n_threads(), carver);
  op.tiles.group(step.in[2], op.rows_per_tile, "matmul_indexed");
  op.rows.pack(step.in[0], run);
  const sys::NodeSplit all = columns_on_nodes(op.reader, step.in[1], op.columns);
  const auto parts = std::span(all.rows).first(static_cast<size_t>(all.n_nodes) + 1);
  for (int64_t round = 0;; ++round) {
    const Block block = block_of(op, parts, round);
    if (block.columns.n_chunks() == 0) break;
    run.checkpoint();
    sys::for_tiles(run.pool, block.columns, op.tiles.n_tiles,
                   [&](int64_t tile, int64_t chunk, int thread) {
                     run_tile(op, step, run, block, op.tiles.tiles[tile], chunk, thread);
                   });
    if (summed) run_sums(op, step, run, block);
  }
}

}  // namespace

const CpuOp matmul_indexed_op = {supports_indexed, indexed_scratch, run_indexed};

}  // namespace mla::cpu
