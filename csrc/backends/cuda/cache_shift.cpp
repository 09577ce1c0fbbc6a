#include "backends/cuda/cache_shift.h"

#include <algorithm>
#include <limits>

#include "backends/cuda/cache_cells.h"
#include "base/error.h"

namespace mla::cuda {
namespace {

// Rows on their way take this much device memory at most, beside the plane itself: enough to keep
// the bus busy, and little beside a cache.
constexpr int64_t kPieceBytes = int64_t{64} << 20;

void check_cells(const char* op, const Tensor& plane, std::span<const int32_t> cells) {
  for (int32_t cell : cells) {
    MLA_CHECK_SHAPE(cell >= 0 && cell < plane.dim(0), op, ": cell ", cell, ", the cache has ",
                    plane.dim(0), " cells");
  }
}

void check_plane(const char* op, const Tensor& plane) {
  MLA_CHECK_SHAPE(plane.shape.rank == 2 && plane.rows_are_contiguous(), op, ": ",
                  static_cast<const Layout&>(plane), " must be [cells, n] with contiguous rows");
}

// A copy on the device of values of the host, enqueued.
template <class T>
std::shared_ptr<std::byte> on_device(std::span<const T> values, Stream stream) {
  std::shared_ptr<std::byte> copy = device_buffer(std::max<size_t>(values.size_bytes(), 1));
  if (!values.empty()) copy_async(copy.get(), values.data(), values.size_bytes(), stream);
  return copy;
}

CellList list_of(const std::shared_ptr<std::byte>& cells, size_t n) {
  return {reinterpret_cast<const int32_t*>(cells.get()), static_cast<int64_t>(n)};
}

// Calls body(list, rows on the device, first row, bytes) for pieces of the cells; each has to end
// before the next one takes its memory.
template <class Body>
void for_pieces(const CudaBackend& backend, const Tensor& plane, std::span<const int32_t> cells,
                const Body& body) {
  const int64_t width = row_bytes(plane.format, plane.dim(1));
  if (cells.empty() || width == 0) return;
  use_device(backend.device().index);
  const auto at_once = static_cast<size_t>(std::max<int64_t>(1, kPieceBytes / width));
  const size_t n_most = std::min(at_once, cells.size());
  const auto rows = device_buffer(n_most * static_cast<size_t>(width));
  const auto all = on_device(cells, backend.stream());
  for (size_t first = 0; first < cells.size(); first += at_once) {
    const size_t n = std::min(at_once, cells.size() - first);
    CellList list = list_of(all, n);
    list.cells += first;
    body(list, rows.get(), first * static_cast<size_t>(width), n * static_cast<size_t>(width));
    sync_stream(backend.stream());
  }
}

CudaRun run_on(const CudaBackend& backend) { return {backend.device(), backend.stream(), nullptr}; }

}  // namespace

void read_cells(const CudaBackend& backend, const Tensor& plane, std::span<const int32_t> cells,
                std::byte* rows) {
  check_plane("read_cells", plane);
  check_cells("read_cells", plane, cells);
  for_pieces(backend, plane, cells,
             [&](CellList list, std::byte* piece, size_t offset, size_t bytes) {
               gather_cells(run_on(backend), view(plane), list, piece);
               copy_async(rows + offset, piece, bytes, backend.stream());
             });
}

void write_cells(const CudaBackend& backend, const Tensor& plane, std::span<const int32_t> cells,
                 const std::byte* rows) {
  check_plane("write_cells", plane);
  check_cells("write_cells", plane, cells);
  for_pieces(backend, plane, cells,
             [&](CellList list, std::byte* piece, size_t offset, size_t bytes) {
               copy_async(piece, rows + offset, bytes, backend.stream());
               scatter_cells(run_on(backend), view(plane), list, piece);
             });
}

void copy_cells(const CudaBackend& backend, const Tensor& plane, std::span<const int32_t> from,
                std::span<const int32_t> to) {
  const char* op = "copy_cells";
  check_plane(op, plane);
  MLA_CHECK_SHAPE(from.size() == to.size(), op, ": ", from.size(), " cells to ", to.size());
  check_cells(op, plane, from);
  check_cells(op, plane, to);
  const auto width = static_cast<size_t>(row_bytes(plane.format, plane.dim(1)));
  if (from.empty() || width == 0) return;
  use_device(backend.device().index);
  const auto rows = device_buffer(from.size() * width);  // all: ranges may overlap
  const auto sources = on_device(from, backend.stream());
  const auto targets = on_device(to, backend.stream());
  gather_cells(run_on(backend), view(plane), list_of(sources, from.size()), rows.get());
  scatter_cells(run_on(backend), view(plane), list_of(targets, to.size()), rows.get());
  sync_stream(backend.stream());
}

void rotate_rope_rows(const CudaBackend& backend, const Tensor& rope_plane,
                      std::span<const int32_t> cells, std::span<const float> frequencies,
                      int64_t delta) {
  const char* op = "rotate_rope_rows";
  check_plane(op, rope_plane);
  check_cells(op, rope_plane, cells);
  const Format format = rope_plane.format;
  const int64_t n = rope_plane.dim(1);
  MLA_CHECK(FormatError, format == Format::F32 || format == Format::F16 || format == Format::BF16,
            op, ": ", format_name(format), ", accepted is F32, F16 or BF16");
  MLA_CHECK_SHAPE(static_cast<int64_t>(frequencies.size()) * 2 == n, op, ": ", frequencies.size(),
                  " frequencies for rows of ", n);
  using Position = std::numeric_limits<int32_t>;
  MLA_CHECK_SHAPE(delta >= Position::min() && delta <= Position::max(), op, ": delta ", delta,
                  " is out of range");
  if (cells.empty()) return;
  use_device(backend.device().index);
  const auto rows = on_device(cells, backend.stream());
  const auto turns = on_device(frequencies, backend.stream());
  rotate_cells(run_on(backend), view(rope_plane), list_of(rows, cells.size()),
               reinterpret_cast<const float*>(turns.get()), static_cast<int32_t>(delta));
  sync_stream(backend.stream());
}

}  // namespace mla::cuda
