// y[.., m, n] = sum_k x[.., m, k] w[.., n, k] (+ residual[.., m, n]).
//
// All rows of x that meet the same matrix of w are one list, over broadcast dims too, and are cut
// into tiles; the chunks of work are (matrix of w, tile, range of n).
#include <algorithm>

#include "backends/cpu/ops/products.h"
#include "backends/cpu/ops/rows.h"

namespace mla::cpu {
namespace {

// Rows of x that meet one matrix of w.
int64_t rows_of_matrix(const Layout& x, const Layout& w) {
  const auto& ex = x.shape.extent;
  const auto& ew = w.shape.extent;
  return ex[0] * ex[1] * ex[2] / std::max<int64_t>(ew[0] * ew[1], 1);
}

struct Matmul {
  Shape x_shape, w_shape;
  WeightReader reader;
  PackedRows rows;
  int64_t ratio0, ratio1;  // batches of x per matrix of w
  int64_t rows_per_matrix;
  int64_t rows_per_tile;
  int64_t tiles_per_matrix;
  sys::RowSplit columns;
  std::byte* room;  // room_bytes() for each thread

  Matmul(const Layout& x, const Layout& w, const MatmulAttrs& attrs, const KernelTable& kernels,
         int n_threads, Carver& carver)
      : x_shape(x.shape),
        w_shape(w.shape),
        reader(WeightReader::plan(w, attrs, kernels, rows_of_matrix(x, w))),
        rows(x, reader, carver) {
    const auto& ex = x.shape.extent;
    const auto& ew = w.shape.extent;
    ratio0 = ex[0] / std::max<int64_t>(ew[0], 1);
    ratio1 = ex[1] / std::max<int64_t>(ew[1], 1);
    rows_per_matrix = rows_of_matrix(x, w);
    rows_per_tile = tile_rows(reader, rows_per_matrix, n_threads);
    tiles_per_matrix = (rows_per_matrix + rows_per_tile - 1) / rows_per_tile;
    columns = split_columns(reader, std::min(rows_per_tile, rows_per_matrix), n_threads, reader.n);
    room = carver.take<std::byte>(n_threads * reader.room_bytes);
  }

  int64_t n_tiles() const { return w_shape.extent[0] * w_shape.extent[1] * tiles_per_matrix; }
};

// Copies residual[n_begin, n_end) of one row to y.
void copy_residual(const std::byte* row, int64_t stride, int64_t n_begin, int64_t n_end, float* y) {
  for (int64_t n = n_begin; n < n_end; ++n) {
    y[n] = *reinterpret_cast<const float*>(row + n * stride);
  }
}

// Columns [begin, end) of one tile, counted over all matrices.
void run_chunk(const Matmul& op, const Step& step, const CpuRun& run, int64_t index, int64_t begin,
               int64_t end, int thread) {
  const Tensor& w = step.in[1];
  const Tensor& residual = step.in[2];
  const int64_t tile = index % op.tiles_per_matrix;
  const int64_t matrix = index / op.tiles_per_matrix;
  const int64_t w0 = matrix / op.w_shape.extent[1];
  const int64_t w1 = matrix % op.w_shape.extent[1];

  const std::byte* x[kMaxTileRows];
  float* y[kMaxTileRows];
  const int64_t first = tile * op.rows_per_tile;
  const int64_t n_rows = std::min(op.rows_per_tile, op.rows_per_matrix - first);
  for (int64_t r = 0; r < n_rows; ++r) {
    const int64_t m = (first + r) % op.x_shape.extent[2];
    const int64_t batch = (first + r) / op.x_shape.extent[2];
    const int64_t i0 = w0 * op.ratio0 + batch / op.ratio1;
    const int64_t i1 = w1 * op.ratio1 + batch % op.ratio1;
    x[r] = op.rows.row(i0, i1, m);
    y[r] = reinterpret_cast<float*>(step.out.at(i0, i1, m));
    if (residual.data != nullptr) {
      copy_residual(residual.at(i0, i1, m), residual.stride[3], begin, end, y[r]);
    }
  }
  multiply(run, thread, op.reader, w, {w0, w1, begin, end}, {x, y, n_rows}, 0,
           residual.data != nullptr, op.room + thread * op.reader.room_bytes);
}

bool supports_matmul(const Node& node, const KernelTable& kernels) {
  const Layout& x = node.input(0)->layout;
  const Layout& w = node.input(1)->layout;
  return WeightReader::plan(w, node.attr<MatmulAttrs>(), kernels, rows_of_matrix(x, w)).kernel !=
         nullptr;
}

size_t matmul_scratch(const Node& node, const KernelTable& kernels, int n_threads) {
  Carver carver(nullptr);
  Matmul(node.input(0)->layout, node.input(1)->layout, node.attr<MatmulAttrs>(), kernels, n_threads,
         carver);
  return carver.used_bytes();
}

void run_matmul(const Step& step, const CpuRun& run) {
  if (step.out.shape.n_elems() == 0) return;
  Carver carver(run.scratch);
  Matmul op(step.in[0], step.in[1], step.node->attr<MatmulAttrs>(), run.kernels,
            run.pool.n_threads(), carver);
  op.rows.pack(step.in[0], run);
  run.checkpoint();
  const sys::NodeSplit columns = columns_on_nodes(op.reader, step.in[1], op.columns);
  sys::for_tiles(run.pool, columns, op.n_tiles(), [&](int64_t tile, int64_t chunk, int thread) {
    run_chunk(op, step, run, tile, columns.begin(chunk), columns.end(chunk), thread);
  });
}

}  // namespace

const CpuOp matmul_op = {supports_matmul, matmul_scratch, run_matmul};

}  // namespace mla::cpu
