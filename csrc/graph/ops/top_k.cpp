// Shape rule of top_k. The result packs ids, values and totals, so that one node yields all.
#include "base/error.h"
#include "graph/ops.h"
#include "graph/ops/checks.h"

namespace mla {

Choice top_k(Graph& g, Node* logits, TopKAttrs a) {
  check_f32("top_k", "logits", logits);
  MLA_CHECK_SHAPE(logits->shape().rank == 2, "top_k: logits ", logits->layout, " must be [M, V]");
  MLA_CHECK_SHAPE(a.k >= 1 && a.k <= std::min<int64_t>(logits->dim(1), kMaxTopK), "top_k: k is ",
                  a.k, ", accepted is 1 to ", std::min<int64_t>(logits->dim(1), kMaxTopK));
  Node* packed = g.add_node(
      Op::top_k, Layout::contiguous(Format::I32, Shape{logits->dim(0), 2 * a.k + 1}), {logits}, a);
  Layout part = packed->layout;
  part.shape = Shape{logits->dim(0), a.k};
  Node* ids = g.add_view(packed, part, 0);
  part.format = Format::F32;
  Node* values = g.add_view(packed, part, a.k * part.stride[3]);
  part.shape = Shape{logits->dim(0), 1};
  Node* totals = g.add_view(packed, part, 2 * a.k * part.stride[3]);
  return {ids, values, totals};
}

}  // namespace mla
