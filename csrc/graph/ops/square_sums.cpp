// Shape rule of the sums of squares that tell how much each column of a weight matters.
#include "base/error.h"
#include "graph/ops.h"
#include "graph/ops/checks.h"

namespace mla {

SquareSums square_sums(Graph& g, SquareSums state, Node* x, Node* ids) {
  const char* op = "square_sums";
  check_float(op, "x", x);
  check_f32(op, "sums", state.sums);
  check_i32(op, "counts", state.counts);
  MLA_CHECK_SHAPE(x->shape().rank >= 2, op, ": x ", x->layout, " is accepted from [M, K] on");
  MLA_CHECK_SHAPE(state.sums->shape().rank == 2 && state.sums->dim(1) == x->dim(-1), op, ": sums ",
                  state.sums->layout, " must be [G, ", x->dim(-1), "]");
  MLA_CHECK_SHAPE(state.counts->shape().rank == 1 && state.counts->dim(0) == state.sums->dim(0), op,
                  ": counts ", state.counts->layout, " must be [", state.sums->dim(0), "]");
  if (ids != nullptr) {
    check_i32(op, "ids", ids);
    MLA_CHECK_SHAPE(x->shape().rank == 3 && ids->shape().rank == 2 && ids->dim(0) == x->dim(0) &&
                        (x->dim(1) == 1 || x->dim(1) == ids->dim(1)),
                    op, ": with ids ", ids->layout, " [T, A], x ", x->layout,
                    " must be [T, A or 1, K]");
  } else {
    const int64_t groups = x->shape().extent[0] * x->shape().extent[1];
    MLA_CHECK_SHAPE(state.sums->dim(0) == groups, op, ": sums ", state.sums->layout, " must have ",
                    groups, " rows, one per matrix of x ", x->layout);
  }
  for (Node* part : {state.sums, state.counts}) {
    const Op root = root_of(part).node->op;
    MLA_CHECK_SHAPE(root == Op::state, op, ": the sums ", part->layout, " are of the kind ",
                    op_name(root), ", accepted is state");
  }
  // As in cache_write: what it returns are views of the state that come after it.
  Node* write = g.add_node(Op::square_sums, Layout::contiguous(Format::I32, Shape{0}),
                           {state.sums, state.counts, x, ids});
  Node* sums = g.add_view(state.sums, state.sums->layout, 0);
  Node* counts = g.add_view(state.counts, state.counts->layout, 0);
  sums->inputs.push_back(write);
  counts->inputs.push_back(write);
  return {sums, counts};
}

}  // namespace mla
