#include "backends/cpu/cache_shift.h"

#include <cstring>
#include <limits>
#include <vector>

#include "base/error.h"

namespace mla::cpu {
namespace {

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

}  // namespace

void rotate_rope_rows(const KernelTable& kernels, const Tensor& rope_plane,
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
  std::vector<float> room(static_cast<size_t>(3 * n));
  float* row = room.data();
  float* turned = row + n;
  float* cosine = turned + n;
  float* sine = cosine + n / 2;
  const RowTable& rows = *kernels.row;
  rows.rotation(static_cast<int32_t>(delta), frequencies.data(), 1.0f, n / 2, cosine, sine);
  const int64_t elem_bytes = rope_plane.stride[3];
  for (int32_t cell : cells) {
    std::byte* data = rope_plane.at(0, 0, cell);
    rows.to_f32(data, format, elem_bytes, n, row);
    rows.rope(row, cosine, sine, n, turned);
    rows.from_f32(turned, n, format, data);
  }
}

void copy_cells(const Tensor& plane, std::span<const int32_t> from, std::span<const int32_t> to) {
  const char* op = "copy_cells";
  check_plane(op, plane);
  MLA_CHECK_SHAPE(from.size() == to.size(), op, ": ", from.size(), " cells to ", to.size());
  check_cells(op, plane, from);
  check_cells(op, plane, to);
  const auto n_bytes = static_cast<size_t>(row_bytes(plane.format, plane.dim(1)));
  std::vector<std::byte> rows(from.size() * n_bytes);
  for (size_t i = 0; i < from.size(); ++i) {
    std::memcpy(rows.data() + i * n_bytes, plane.at(0, 0, from[i]), n_bytes);
  }
  for (size_t i = 0; i < to.size(); ++i) {
    std::memcpy(plane.at(0, 0, to[i]), rows.data() + i * n_bytes, n_bytes);
  }
}

}  // namespace mla::cpu
