// Indices that only a device would see when it is too late: row ids, expert ids and cells that come
// from the host are looked at there, before anything runs. The CPU's operations look themselves.
#pragma once

#include <cstdint>

#include "graph/node.h"

namespace mla {

// Values that must lie in [low, high]; what computes ids on the device keeps its own promise.
struct IndexCheck {
  const Node* node = nullptr;  // the one that uses them
  Node* indices = nullptr;     // null: nothing to check
  int64_t low = 0, high = 0;
};

IndexCheck index_check_of(const Node& node);

// `indices` in host memory. Throws ShapeError.
void check_indices(const IndexCheck& check, const Tensor& indices);

}  // namespace mla
