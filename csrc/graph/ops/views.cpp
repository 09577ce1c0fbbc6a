// Shape rules of the views: new strides over the same memory.
#include "graph/ops.h"

namespace mla {

Node* view_permute(Graph& g, Node* x, std::span<const int> axes) {
  return g.add_view(x, permute(x->layout, axes), 0);
}

Node* view_slice(Graph& g, Node* x, int axis, int64_t begin, int64_t end) {
  const Slice s = slice(x->layout, axis, begin, end);
  return g.add_view(x, s.layout, s.offset_bytes);
}

Node* view_reshape(Graph& g, Node* x, const Shape& shape) {
  return g.add_view(x, reshape(x->layout, shape), 0);
}

Node* view_broadcast(Graph& g, Node* x, const Shape& shape) {
  return g.add_view(x, broadcast(x->layout, shape), 0);
}

}  // namespace mla
