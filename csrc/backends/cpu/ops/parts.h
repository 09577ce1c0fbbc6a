// Work where its weights lie: operands that are kept in parts, one per node.
#pragma once

#include <algorithm>
#include <array>
#include <span>

#include "backends/cpu/ops/ops.h"

namespace mla::cpu {

// Where each part's indices of one dim begin, and the dim's extent at the end; nothing where the
// operand is not kept in parts along that dim.
class PartBegins {
 public:
  PartBegins() = default;
  // Of dim 1 or 2 of w: heads, or rows of each matrix.
  PartBegins(const Tensor& w, size_t dim) {
    const int64_t step = w.stride[dim];
    const int64_t n = w.shape.extent[dim];
    if (w.slices == nullptr || step <= 0) return;
    // Each index must lie in the slices' matrices where it does in the first of them.
    const bool whole = w.slices->matrix_bytes == step * n && w.slices_offset < step;
    if (!whole || w.slices->parts.size() > sys::kMaxNodes) return;
    for (const Slices::Part& part : w.slices->parts) at_[n_++] = (part.begin + step - 1) / step;
    at_[n_] = n;
  }
  bool empty() const { return n_ == 0; }
  size_t n_parts() const { return n_; }
  std::span<const int64_t> span() const { return {at_.data(), n_ + 1}; }
  // Of `per_index` things for every index in [first, first + n), counted from there.
  PartBegins of(int64_t first, int64_t n, int64_t per_index) const {
    PartBegins out = *this;
    for (size_t i = 0; i <= n_; ++i) {
      out.at_[i] = std::clamp<int64_t>(at_[i] - first, 0, n) * per_index;
    }
    return out;
  }

 private:
  std::array<int64_t, sys::kMaxNodes + 1> at_ = {};
  size_t n_ = 0;
};

// Calls body(task, thread) for tasks_per_head tasks of each of the heads [first, first + n_heads),
// head by head, on the node that has the head's matrix of w.
template <class Body>
void for_heads(const CpuRun& run, const Tensor& w, int64_t first, int64_t n_heads,
               int64_t tasks_per_head, const Body& body) {
  const PartBegins heads(w, 1);
  if (heads.empty()) {
    run.pool.parallel_for(n_heads * tasks_per_head, body);
  } else {
    run.pool.parallel_for(heads.of(first, n_heads, tasks_per_head).span(), body);
  }
}

// How many parts the node's operand is kept in.
inline int64_t n_parts(const Slices* slices) {
  return slices == nullptr ? 1 : static_cast<int64_t>(slices->parts.size());
}

}  // namespace mla::cpu
