// Weights that are kept in parts, as products read them.
#pragma once

#include <algorithm>

#include "graph/tensor.h"

namespace mla::cpu {

// Calls body(base, first, last) for rows [begin, end) of matrix (i0, i1) of w, one run of rows that
// lie together at a time: row n of a run is at base + n * stride[2].
template <class Body>
void for_runs(const Tensor& w, int64_t i0, int64_t i1, int64_t begin, int64_t end,
              const Body& body) {
  if (w.slices == nullptr) {
    body(static_cast<const std::byte*>(w.at(i0, i1, 0)), begin, end);
    return;
  }
  while (begin < end) {
    const Tensor::Rows run = w.rows_at(i0, i1, begin);
    const int64_t last = std::min(begin + run.n, end);
    body(static_cast<const std::byte*>(run.data - begin * w.stride[2]), begin, last);
    begin = last;
  }
}

}  // namespace mla::cpu
