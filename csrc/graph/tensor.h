// A strided view over typed memory, up to 4 dimensions, outermost first.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "graph/slices.h"
#include "quant/format.h"

namespace mla {

inline constexpr int kMaxRank = 4;

// Extents or byte strides, outermost first, stored right-aligned: index 3 is the innermost dim
// (ggml's dim 0). Unused leading extents are 1, so kernels may always loop over four.
struct Shape {
  int rank = 0;
  std::array<int64_t, kMaxRank> extent = {1, 1, 1, 1};

  Shape() = default;
  Shape(std::initializer_list<int64_t> dims);
  explicit Shape(std::span<const int64_t> dims);

  int64_t dim(int i) const;  // i in [-rank, rank)
  int64_t n_elems() const { return extent[0] * extent[1] * extent[2] * extent[3]; }
  std::span<const int64_t> dims() const {
    return {extent.data() + (kMaxRank - rank), size_t(rank)};
  }
  std::string str() const;
  bool operator==(const Shape&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Shape& shape);

// Format, extents and strides: all that is known of a tensor before it has memory.
struct Layout {
  Format format = Format::F32;
  Shape shape;
  // Bytes from one index to the next per dim, right-aligned like Shape; 0 broadcasts. For a
  // quantized format stride[3] is the bytes of one *block* and must equal block_bytes.
  std::array<int64_t, kMaxRank> stride = {0, 0, 0, 0};

  static Layout contiguous(Format format, const Shape& shape);
  bool is_contiguous() const;
  bool rows_are_contiguous() const;  // innermost elements adjacent
  // Bytes from the lowest byte to one past the highest that any index reaches.
  int64_t span_bytes() const;
  // Where the lowest byte lies: 0, or less where a stride is negative.
  int64_t low_bytes() const;
  int64_t dim(int i) const { return shape.dim(i); }
  std::string str() const;  // "F32 [2, 3]"
};

std::ostream& operator<<(std::ostream& out, const Layout& layout);

// Views never copy. All throw ShapeError.
Layout permute(const Layout& x, std::span<const int> axes);  // out dim i = x dim axes[i]
Layout broadcast(const Layout& x, const Shape& shape);       // 1 -> n, new leading dims
struct Slice {
  Layout layout;
  int64_t offset_bytes;
};
Slice slice(const Layout& x, int axis, int64_t begin, int64_t end);  // quantized rows: whole blocks
// Any regrouping of dims that strides can express; throws where data would have to move.
Layout reshape(const Layout& x, const Shape& shape);

struct Tensor : Layout {
  std::byte* data = nullptr;  // not owned: the Buffer or mapping behind it must outlive the use
  // Where it is kept in parts: addresses come from at() and rows_at(), and data only says that it
  // is there. slices_offset is where this view begins in what the slices describe.
  const Slices* slices = nullptr;
  int64_t slices_offset = 0;

  Tensor() = default;
  Tensor(const Layout& layout, void* memory)
      : Layout(layout), data(static_cast<std::byte*>(memory)) {}

  std::byte* at(int64_t i0, int64_t i1, int64_t i2) const {
    const int64_t offset = i0 * stride[0] + i1 * stride[1] + i2 * stride[2];
    return slices == nullptr ? data + offset : slices->find(slices_offset + offset).data;
  }
  // Row (i0, i1, i2), and how many of the rows from there on lie with it, stride[2] apart.
  struct Rows {
    std::byte* data;
    int64_t n;
    int part;  // of the slices; -1: there are none
  };
  Rows rows_at(int64_t i0, int64_t i1, int64_t i2) const;
  template <class T>
  T* ptr() const {
    return reinterpret_cast<T*>(data);
  }
};

}  // namespace mla
