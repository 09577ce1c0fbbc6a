// y[.., m, n] = silu(sum_k x[.., m, k] gate[n, k]) * sum_k x[.., m, k] up[n, k]; with ids, gate and
// up are those of expert ids[t, a].
//
// x is packed once where both weights want the same packing. A tile's gate products go to the
// result, its up products to scratch that stays in the cache, and are joined there at once.
#include <algorithm>
#include <optional>

#include "backends/cpu/ops/products.h"
#include "backends/cpu/ops/rows.h"

namespace mla::cpu {
namespace {

// A tile's up products: 512 rows of 128 floats are a quarter of a second-level cache.
constexpr int64_t kMaxColumns = 128;

bool same_packing(const WeightReader& a, const WeightReader& b) {
  return a.pack == b.pack && (a.reading == Reading::across) == (b.reading == Reading::across);
}

// Rows of x that meet one matrix: of an expert on average, if there are ids.
int64_t rows_of_matrix(const Layout& x, const Layout& gate, const Layout* ids) {
  if (ids == nullptr) return n_rows(x.shape);
  return ids->shape.extent[2] * ids->shape.extent[3] / std::max<int64_t>(gate.shape.extent[1], 1);
}

struct SwigluMatmul {
  WeightReader gate, up;
  PackedRows rows;
  std::optional<PackedRows> up_rows;  // only where they differ
  std::optional<ExpertTiles> experts;
  Shape x_shape;
  int64_t n_rows;  // of x
  int64_t rows_per_tile;
  sys::RowSplit columns;
  std::byte* room;
  int64_t room_bytes;
  float* products;  // [thread][rows_per_tile][columns.rows_per_chunk]

  SwigluMatmul(const Layout& x, const Layout& gate_layout, const Layout& up_layout,
               const Layout* ids, const MatmulAttrs& attrs, const KernelTable& kernels,
               int n_threads, Carver& carver)
      : gate(WeightReader::plan(gate_layout, attrs, kernels, rows_of_matrix(x, gate_layout, ids))),
        up(WeightReader::plan(up_layout, attrs, kernels, rows_of_matrix(x, gate_layout, ids))),
        rows(x, gate, carver),
        x_shape(x.shape),
        n_rows(cpu::n_rows(x.shape)) {
    if (!same_packing(gate, up)) up_rows.emplace(x, up, carver);
    if (ids != nullptr) experts.emplace(*ids, gate_layout.shape.extent[1], carver);
    const auto rows_of = [&](const WeightReader& reader) {
      return experts ? expert_tile_rows(reader) : tile_rows(reader, n_rows, n_threads);
    };
    rows_per_tile = std::min(rows_of(gate), rows_of(up));
    // Chunks must begin where both weights can: across only the coarser of the two granules.
    const WeightReader& coarser = gate.granule > up.granule ? gate : up;
    const int64_t likely_rows =
        std::min(rows_per_tile, rows_of_matrix(x, gate_layout, ids) + (experts ? 1 : 0));
    columns = split_columns(coarser, likely_rows, n_threads, kMaxColumns);
    room_bytes = std::max(gate.room_bytes, up.room_bytes);
    room = carver.take<std::byte>(n_threads * room_bytes);
    products = carver.take<float>(n_threads * rows_per_tile * columns.rows_per_chunk);
  }

  int64_t n_tiles() const {
    return experts ? experts->n_tiles : (n_rows + rows_per_tile - 1) / rows_per_tile;
  }
};

SwigluMatmul plan(const Layout& x, const Layout& gate, const Layout& up, const Layout* ids,
                  const MatmulAttrs& attrs, const KernelTable& kernels, int n_threads,
                  Carver& carver) {
  return SwigluMatmul(x, gate, up, ids, attrs, kernels, n_threads, carver);
}

// The rows of x and of the result that one tile covers, and whose weights it meets.
struct TileRows {
  const std::byte* x[kMaxTileRows];
  const std::byte* up_x[kMaxTileRows];
  float* y[kMaxTileRows];  // from the chunk's first column on
  int64_t n_rows;
  int64_t expert = 0;
};

void find_rows(const SwigluMatmul& op, const Step& step, int64_t tile, int64_t begin,
               TileRows& out) {
  const int64_t first = op.experts ? op.experts->tiles[tile].first : tile * op.rows_per_tile;
  out.n_rows =
      op.experts ? op.experts->tiles[tile].n_pairs : std::min(op.rows_per_tile, op.n_rows - first);
  if (op.experts) out.expert = op.experts->tiles[tile].expert;
  for (int64_t r = 0; r < out.n_rows; ++r) {
    // With ids, result rows are pairs (t, a); without, they are numbered as those of x.
    const int64_t result = op.experts ? op.experts->pairs[first + r] : first + r;
    const int64_t row = op.experts ? result / op.experts->n_slots : result;
    const int64_t i2 = row % op.x_shape.extent[2];
    const int64_t i1 = row / op.x_shape.extent[2] % op.x_shape.extent[1];
    const int64_t i0 = row / op.x_shape.extent[2] / op.x_shape.extent[1];
    out.x[r] = op.rows.row(i0, i1, i2);
    out.up_x[r] = op.up_rows ? op.up_rows->row(i0, i1, i2) : out.x[r];
    out.y[r] = reinterpret_cast<float*>(row_at(step.out, result)) + begin;
  }
}

void run_tile(const SwigluMatmul& op, const Step& step, const CpuRun& run, int64_t tile,
              int64_t begin, int64_t end, int thread) {
  TileRows rows;
  find_rows(op, step, tile, begin, rows);
  const int64_t width = op.columns.rows_per_chunk;
  float* products = op.products + thread * op.rows_per_tile * width;
  float* up_y[kMaxTileRows];
  for (int64_t r = 0; r < rows.n_rows; ++r) up_y[r] = products + r * width;

  std::byte* room = op.room + thread * op.room_bytes;
  const WeightRange range = {0, rows.expert, begin, end};
  multiply(run, thread, op.gate, step.in[1], range, {rows.x, rows.y, rows.n_rows}, begin, false,
           room);
  multiply(run, thread, op.up, step.in[2], range, {rows.up_x, up_y, rows.n_rows}, begin, false,
           room);
  for (int64_t r = 0; r < rows.n_rows; ++r) {
    run.kernels.row->swiglu(rows.y[r], up_y[r], end - begin, rows.y[r]);
  }
}

bool supports_swiglu_matmul(const Node& node, const KernelTable& kernels) {
  const Node* ids = node.input(3);
  const int64_t n_rows = rows_of_matrix(node.input(0)->layout, node.input(1)->layout,
                                        ids != nullptr ? &ids->layout : nullptr);
  const auto kernel = [&](size_t i) {
    const Layout& w = node.input(i)->layout;
    return WeightReader::plan(w, node.attr<MatmulAttrs>(), kernels, n_rows).kernel;
  };
  return kernel(1) != nullptr && kernel(2) != nullptr;
}

size_t swiglu_matmul_scratch(const Node& node, const KernelTable& kernels, int n_threads) {
  Carver carver(nullptr);
  const Node* ids = node.input(3);
  plan(node.input(0)->layout, node.input(1)->layout, node.input(2)->layout,
       ids != nullptr ? &ids->layout : nullptr, node.attr<MatmulAttrs>(), kernels, n_threads,
       carver);
  return carver.used_bytes();
}

void run_swiglu_matmul(const Step& step, const CpuRun& run) {
  const Tensor& ids = step.in[3];
  Carver carver(run.scratch);
  SwigluMatmul op = plan(step.in[0], step.in[1], step.in[2], ids.data != nullptr ? &ids : nullptr,
                         step.node->attr<MatmulAttrs>(), run.kernels, run.pool.n_threads(), carver);
  if (op.experts) op.experts->group(ids, op.rows_per_tile, "swiglu_matmul");
  if (step.out.shape.n_elems() == 0) return;
  op.rows.pack(step.in[0], run);
  if (op.up_rows) op.up_rows->pack(step.in[0], run);
  run.checkpoint();
  const sys::NodeSplit columns = columns_on_nodes(op.gate, step.in[1], op.columns);
  sys::for_tiles(run.pool, columns, op.n_tiles(), [&](int64_t tile, int64_t chunk, int thread) {
    run_tile(op, step, run, tile, columns.begin(chunk), columns.end(chunk), thread);
  });
}

}  // namespace

const CpuOp swiglu_matmul_op = {supports_swiglu_matmul, swiglu_matmul_scratch, run_swiglu_matmul};

}  // namespace mla::cpu
