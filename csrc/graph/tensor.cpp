#include "graph/tensor.h"

#include <algorithm>
#include <cstdlib>
#include <ostream>
#include <sstream>
#include <vector>

#include "base/error.h"

namespace mla {

namespace {

// Below this, bytes, strides and sums of a graph's sizes stay far within 64 bits.
constexpr int64_t kMaxElems = int64_t{1} << 50;

void check_count(const Shape& shape) {
  int64_t n = 1;
  for (int64_t extent : shape.extent) {  // empty dims count as one: strides are products too
    const bool fits = !__builtin_mul_overflow(n, std::max<int64_t>(extent, 1), &n);
    MLA_CHECK_SHAPE(fits && n <= kMaxElems, "shape: ", shape, " has more than 2^50 elements");
  }
}

}  // namespace

Shape::Shape(std::initializer_list<int64_t> dims)
    : Shape(std::span<const int64_t>(dims.begin(), dims.size())) {}

Shape::Shape(std::span<const int64_t> dims) : rank(static_cast<int>(dims.size())) {
  MLA_CHECK_SHAPE(dims.size() <= kMaxRank, "shape: ", dims.size(),
                  " dimensions came, at most 4 are accepted");
  for (size_t i = 0; i < dims.size(); ++i) {
    MLA_CHECK_SHAPE(dims[i] >= 0, "shape: extent ", dims[i], " is negative");
    extent[kMaxRank - dims.size() + i] = dims[i];
  }
  check_count(*this);
}

int64_t Shape::dim(int i) const {
  MLA_CHECK_SHAPE(i >= -rank && i < rank, "shape ", str(), " has no dim ", i);
  return extent[i < 0 ? kMaxRank + i : kMaxRank - rank + i];
}

std::string Shape::str() const {
  std::ostringstream out;
  out << '[';
  for (int i = 0; i < rank; ++i) out << (i ? ", " : "") << extent[kMaxRank - rank + i];
  out << ']';
  return out.str();
}

std::ostream& operator<<(std::ostream& out, const Shape& shape) { return out << shape.str(); }

Layout Layout::contiguous(Format format, const Shape& shape) {
  check_count(shape);
  Layout out{format, shape, {}};
  const FormatTraits& t = traits(format);
  out.stride[3] = t.block_bytes;
  out.stride[2] = row_bytes(format, shape.extent[3]);
  out.stride[1] = out.stride[2] * shape.extent[2];
  out.stride[0] = out.stride[1] * shape.extent[1];
  return out;
}

bool Layout::rows_are_contiguous() const {
  return stride[3] == traits(format).block_bytes || shape.extent[3] <= traits(format).block_elems;
}

bool Layout::is_contiguous() const {
  const Layout dense = contiguous(format, shape);
  for (int i = 0; i < 3; ++i) {
    if (shape.extent[i] > 1 && stride[i] != dense.stride[i]) return false;
  }
  return rows_are_contiguous();
}

int64_t Layout::span_bytes() const {
  if (shape.n_elems() == 0) return 0;
  const FormatTraits& t = traits(format);
  int64_t bytes = (shape.extent[3] / t.block_elems - 1) * std::abs(stride[3]) + t.block_bytes;
  for (int i = 0; i < 3; ++i) bytes += (shape.extent[i] - 1) * std::abs(stride[i]);
  return bytes;
}

int64_t Layout::low_bytes() const {
  if (shape.n_elems() == 0) return 0;
  const int64_t last = shape.extent[3] / traits(format).block_elems - 1;
  int64_t bytes = last * std::min<int64_t>(stride[3], 0);
  for (int i = 0; i < 3; ++i) bytes += (shape.extent[i] - 1) * std::min<int64_t>(stride[i], 0);
  return bytes;
}

std::string Layout::str() const { return concat(format_name(format), " ", shape.str()); }

std::ostream& operator<<(std::ostream& out, const Layout& layout) { return out << layout.str(); }

Layout permute(const Layout& x, std::span<const int> axes) {
  const int rank = x.shape.rank;
  const int base = kMaxRank - rank;
  MLA_CHECK_SHAPE(static_cast<int>(axes.size()) == rank, "permute: ", axes.size(), " axes for ", x);
  Layout out = x;
  std::array<bool, kMaxRank> seen = {};
  for (int i = 0; i < rank; ++i) {
    MLA_CHECK_SHAPE(axes[i] >= 0 && axes[i] < rank && !seen[axes[i]],
                    "permute: axes are no permutation of 0..", rank - 1);
    seen[axes[i]] = true;
    out.shape.extent[base + i] = x.shape.extent[base + axes[i]];
    out.stride[base + i] = x.stride[base + axes[i]];
  }
  MLA_CHECK_SHAPE(!traits(x.format).quantized || rank == 0 || axes[rank - 1] == rank - 1,
                  "permute: blocks of ", format_name(x.format), " must stay innermost");
  return out;
}

Layout broadcast(const Layout& x, const Shape& shape) {
  MLA_CHECK_SHAPE(shape.rank >= x.shape.rank, "broadcast: ", x, " to ", shape, " loses dims");
  Layout out = x;
  out.shape = shape;
  for (int i = 0; i < kMaxRank; ++i) {
    if (x.shape.extent[i] == shape.extent[i]) continue;
    MLA_CHECK_SHAPE(x.shape.extent[i] == 1, "broadcast: ", x, " to ", shape,
                    ": only extents of 1 grow");
    MLA_CHECK_SHAPE(i < 3 || !traits(x.format).quantized, "broadcast: blocks of ",
                    format_name(x.format), " cannot be repeated along a row");
    out.stride[i] = 0;
  }
  return out;
}

Slice slice(const Layout& x, int axis, int64_t begin, int64_t end) {
  const int rank = x.shape.rank;
  MLA_CHECK_SHAPE(axis >= -rank && axis < rank, "slice: ", x, " has no axis ", axis);
  const int i = axis < 0 ? kMaxRank + axis : kMaxRank - rank + axis;
  MLA_CHECK_SHAPE(0 <= begin && begin <= end && end <= x.shape.extent[i], "slice: [", begin, ", ",
                  end, ") of axis ", axis, " of ", x);
  Slice out{x, 0};
  out.layout.shape.extent[i] = end - begin;
  const int64_t per_step = i == 3 ? traits(x.format).block_elems : 1;
  MLA_CHECK_SHAPE(begin % per_step == 0 && end % per_step == 0, "slice: [", begin, ", ", end,
                  ") cuts blocks of ", format_name(x.format));
  out.offset_bytes = begin / per_step * x.stride[i];
  return out;
}

namespace {

struct Run {  // dims of x that lie behind one another in memory, seen as one
  int64_t extent;
  int64_t stride;
};

std::vector<Run> merge_dims(const Layout& x, int last) {
  std::vector<Run> runs;  // outermost first
  for (int i = 0; i < last; ++i) {
    const int64_t n = x.shape.extent[i];
    if (n == 1) continue;
    if (!runs.empty() && runs.back().stride == x.stride[i] * n) {
      runs.back() = {runs.back().extent * n, x.stride[i]};
    } else {
      runs.push_back({n, x.stride[i]});
    }
  }
  return runs;
}

}  // namespace

Layout reshape(const Layout& x, const Shape& shape) {
  MLA_CHECK_SHAPE(x.shape.n_elems() == shape.n_elems(), "reshape: ", x, " to ", shape,
                  ": the number of elements differs");
  if (x.shape.n_elems() == 0 || x.is_contiguous()) return Layout::contiguous(x.format, shape);
  // Rows of blocks keep their innermost dim; everything else may be regrouped.
  const bool quantized = traits(x.format).quantized;
  const int last = quantized ? 3 : 4;
  MLA_CHECK_SHAPE(!quantized || shape.extent[3] == x.shape.extent[3], "reshape: ", x, " to ", shape,
                  ": rows of blocks must keep their length");
  std::vector<Run> runs = merge_dims(x, last);
  Layout out{x.format, shape, {}};
  out.stride[3] = x.stride[3];
  int64_t left = runs.empty() ? 1 : runs.back().extent;
  int64_t step = runs.empty() ? traits(x.format).block_bytes : runs.back().stride;
  for (int i = last - 1; i >= 0; --i) {
    const int64_t n = shape.extent[i];
    while (left == 1 && n > 1) {
      runs.pop_back();
      MLA_CHECK_SHAPE(!runs.empty(), "reshape: ", x, " to ", shape);
      left = runs.back().extent;
      step = runs.back().stride;
    }
    MLA_CHECK_SHAPE(left % n == 0, "reshape: ", x, " to ", shape,
                    ": these strides would need a copy");
    out.stride[i] = step;
    step *= n;
    left /= n;
  }
  return out;
}

Tensor::Rows Tensor::rows_at(int64_t i0, int64_t i1, int64_t i2) const {
  const int64_t left = shape.extent[2] - i2;
  if (slices == nullptr) return {at(i0, i1, i2), left, -1};
  const int64_t offset = i0 * stride[0] + i1 * stride[1] + i2 * stride[2];
  const Slices::Place place = slices->find(slices_offset + offset);
  const int64_t step = std::max<int64_t>(stride[2], 1);
  return {place.data, std::min(left, (place.left_bytes + step - 1) / step), place.part};
}

}  // namespace mla
