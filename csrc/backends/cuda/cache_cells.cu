// Cells of a plane, by number:
//
//   gather   rows[i] = plane[cells[i]]        scatter   plane[cells[i]] = rows[i]
//   rotate   (x0, x1) -> (x0 c - x1 s, x0 s + x1 c) on the pairs of plane[cells[i]]
//
// A thread moves a unit of 2 to 16 bytes, the largest that rows, strides and addresses are
// multiples of, or turns a pair. Moves are exact; a turned element is within 3 units in the last
// place of the pair's length before it is rounded to the plane's format.
#include "backends/cuda/cache_cells.h"

#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/kernels/math.cuh"

namespace mla::cuda {
namespace {

constexpr int kThreads = 256;

struct Move {
  std::byte* plane;
  int64_t cell_stride;  // bytes
  const int32_t* cells;
  std::byte* rows;
  int64_t n_rows, row_units;
  bool to_plane;
};

template <class Unit>
__global__ void __launch_bounds__(kThreads) move_kernel(Move m) {
  pdl_wait();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= m.n_rows * m.row_units) return;
  const int64_t row = i / m.row_units;
  auto* cell = reinterpret_cast<Unit*>(m.plane + m.cells[row] * m.cell_stride);
  auto* at = reinterpret_cast<Unit*>(m.rows) + i;
  const int64_t unit = i - row * m.row_units;
  if (m.to_plane) {
    cell[unit] = *at;
  } else {
    *at = cell[unit];
  }
}

unsigned blocks_for(int64_t n_threads) {
  return static_cast<unsigned>((n_threads + kThreads - 1) / kThreads);
}

void move(const CudaRun& run, const View& plane, CellList list, std::byte* rows, bool to_plane) {
  const int64_t bytes = row_bytes(plane.format, plane.extent[3]);
  if (bytes * list.n == 0) return;
  const uint64_t bits = reinterpret_cast<uintptr_t>(plane.data) |
                        static_cast<uint64_t>(plane.stride[2]) | static_cast<uint64_t>(bytes) | 16;
  const auto unit = static_cast<int64_t>(bits & (~bits + 1));  // the lowest bit of all
  const Move m = {plane.data, plane.stride[2], list.cells, rows, list.n, bytes / unit, to_plane};
  const dim3 grid(blocks_for(m.n_rows * m.row_units));
  const dim3 block(kThreads);
  if (unit == 2) return launch(run, move_kernel<uint16_t>, grid, block, 0, m);
  if (unit == 4) return launch(run, move_kernel<uint32_t>, grid, block, 0, m);
  if (unit == 8) return launch(run, move_kernel<uint2>, grid, block, 0, m);
  launch(run, move_kernel<uint4>, grid, block, 0, m);
}

struct Turn {
  std::byte* plane;
  int64_t cell_stride;  // bytes
  Format format;
  int elem_bytes;
  const int32_t* cells;
  int64_t n_cells;
  int half;  // R / 2
  const float* frequencies;
  int32_t delta;
};

__global__ void __launch_bounds__(kThreads) rotate_kernel(Turn turn) {
  pdl_wait();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= turn.n_cells * turn.half) return;
  const int64_t row = i / turn.half;
  const auto pair = static_cast<int>(i - row * turn.half);
  std::byte* even = turn.plane + turn.cells[row] * turn.cell_stride + 2 * pair * turn.elem_bytes;
  std::byte* odd = even + turn.elem_bytes;
  const Rotation r = rotation(turn.delta, turn.frequencies[pair], 1.0f);
  const float x = load_element(even, turn.format);
  const float y = load_element(odd, turn.format);
  store_element(even, turn.format, x * r.cosine - y * r.sine);
  store_element(odd, turn.format, x * r.sine + y * r.cosine);
}

}  // namespace

void gather_cells(const CudaRun& run, const View& plane, CellList from, std::byte* rows) {
  move(run, plane, from, rows, false);
}

void scatter_cells(const CudaRun& run, const View& plane, CellList to, const std::byte* rows) {
  move(run, plane, to, const_cast<std::byte*>(rows), true);
}

void rotate_cells(const CudaRun& run, const View& plane, CellList cells, const float* frequencies,
                  int32_t delta) {
  const Turn turn = {plane.data,
                     plane.stride[2],
                     plane.format,
                     static_cast<int>(traits(plane.format).block_bytes),
                     cells.cells,
                     cells.n,
                     static_cast<int>(plane.extent[3] / 2),
                     frequencies,
                     delta};
  launch(run, rotate_kernel, dim3(blocks_for(turn.n_cells * turn.half)), dim3(kThreads), 0, turn);
}

}  // namespace mla::cuda
