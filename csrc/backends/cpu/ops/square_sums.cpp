// sums[g, k] += sum over rows r of group g of x[r, k]^2; counts[g] += rows of group g.
// A group is a matrix of x, or with ids all rows that meet one expert.
//
// A piece of a group's columns is one body's work: it sums the rows in their order, in double, and
// rounds once.
#include <cstring>

#include "backends/cpu/ops/carver.h"
#include "backends/cpu/ops/products.h"
#include "backends/cpu/ops/rows.h"

namespace mla::cpu {
namespace {

bool supports(const Node& node, const KernelTable&) {
  return node.input(0)->layout.rows_are_contiguous();
}

size_t scratch_bytes(const Node& node, const KernelTable&, int) {
  if (node.input(3) == nullptr) return 0;
  Carver carver(nullptr);
  ExpertTiles(node.input(3)->layout, node.input(0)->dim(0), carver);
  return carver.used_bytes();
}

void count(const Tensor& counts, int64_t group, int64_t n_rows) {
  std::byte* p = counts.data + group * counts.stride[3];
  int32_t value;
  std::memcpy(&value, p, sizeof value);
  value += static_cast<int32_t>(n_rows);
  std::memcpy(p, &value, sizeof value);
}

// Adds the squares of columns [piece.first, + piece.n) of `rows` rows to those of row `group`.
template <class RowAt>
void add_rows(const CpuRun& run, const Tensor& sums, int64_t group, const Tensor& x,
              const Piece& piece, int64_t rows, const RowAt& row_of) {
  float room[kPieceElems];
  double total[kPieceElems] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const std::byte* from = row_of(r) + piece.first * x.stride[3];
    run.kernels.row->add_squares(as_f32(run, from, x, piece.n, room), piece.n, total);
  }
  float* to = reinterpret_cast<float*>(sums.at(0, 0, group)) + piece.first;
  for (int64_t i = 0; i < piece.n; ++i) {
    to[i] = static_cast<float>(static_cast<double>(to[i]) + total[i]);
  }
}

void run_batched(const Step& step, const CpuRun& run) {
  const auto& [sums, counts, x, ids, unused1, unused2, unused3, unused4] = step.in;
  const int64_t rows = x.shape.extent[2];
  if (rows == 0) return;
  for_pieces(run, sums.shape, rows * row_bytes(x.format, 1), [&](const Piece& piece) {
    const int64_t outer = x.shape.extent[1];
    add_rows(run, sums, piece.row, x, piece, rows,
             [&](int64_t r) { return x.at(piece.row / outer, piece.row % outer, r); });
  });
  for (int64_t group = 0; group < sums.dim(0); ++group) count(counts, group, rows);
}

void run_indexed(const Step& step, const CpuRun& run) {
  const auto& [sums, counts, x, ids, unused1, unused2, unused3, unused4] = step.in;
  Carver carver(run.scratch);
  ExpertTiles tiles(ids, sums.dim(0), carver);
  const int64_t n_pairs = tiles.n_tokens * tiles.n_slots;
  tiles.group(ids, n_pairs + 1, "square_sums");  // one tile per expert that is met
  if (tiles.n_tiles == 0) return;
  const bool one_row = x.shape.extent[2] == 1;
  const int64_t rows_per_tile = n_pairs / tiles.n_tiles + 1;
  for_pieces(run, Shape{tiles.n_tiles, sums.dim(1)}, rows_per_tile * row_bytes(x.format, 1),
             [&](const Piece& piece) {
               const ExpertTiles::Tile& tile = tiles.tiles[piece.row];
               add_rows(run, sums, tile.expert, x, piece, tile.n_pairs, [&](int64_t r) {
                 const int64_t pair = tiles.pairs[tile.first + r];
                 return x.at(0, pair / tiles.n_slots, one_row ? 0 : pair % tiles.n_slots);
               });
             });
  for (int64_t i = 0; i < tiles.n_tiles; ++i) {
    count(counts, tiles.tiles[i].expert, tiles.tiles[i].n_pairs);
  }
}

void run_square_sums(const Step& step, const CpuRun& run) {
  if (step.in[3].data != nullptr) {
    run_indexed(step, run);
  } else {
    run_batched(step, run);
  }
}

}  // namespace

const CpuOp square_sums_op = {supports, scratch_bytes, run_square_sums};

}  // namespace mla::cpu
