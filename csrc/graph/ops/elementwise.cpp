// Shape rules of the ops that work row by row.
#include "base/error.h"
#include "graph/ops.h"
#include "graph/ops/checks.h"

namespace mla {

Node* copy(Graph& g, Node* x, Format format) {
  if (x->format() != format) check_float("copy", "x", x);
  MLA_CHECK(FormatError, x->format() == format || is_float_format(format), "copy: to ",
            format_name(format), ", accepted is F32, F16 or BF16");
  return g.add_node(Op::copy, Layout::contiguous(format, x->shape()), {x});
}

Node* add(Graph& g, Node* a, Node* b) {
  check_f32("add", "a", a);
  check_f32("add", "b", b);
  MLA_CHECK_SHAPE(a->shape() == b->shape(), "add: shapes differ: a ", a->layout, ", b ", b->layout);
  return g.add_node(Op::add, Layout::contiguous(Format::F32, a->shape()), {a, b});
}

Node* get_rows(Graph& g, Node* table, Node* ids) {
  check_format("get_rows", "table", table, is_weight_format(table->format()), "a weight format");
  check_i32("get_rows", "ids", ids);
  MLA_CHECK_SHAPE(table->shape().rank == 2 && ids->shape().rank == 1, "get_rows: table ",
                  table->layout, " must be [V, D] and ids ", ids->layout, " [T]");
  return g.add_node(Op::get_rows,
                    Layout::contiguous(Format::F32, Shape{ids->dim(0), table->dim(1)}),
                    {table, ids});
}

Node* rms_norm(Graph& g, Node* x, Node* weight, RmsNormAttrs attrs) {
  check_float("rms_norm", "x", x);
  MLA_CHECK_SHAPE(x->shape().rank >= 1, "rms_norm: x ", x->layout, " has no dim");
  if (weight != nullptr) {
    check_f32("rms_norm", "weight", weight);
    MLA_CHECK_SHAPE(weight->shape().rank == 1 && weight->dim(0) == x->dim(-1), "rms_norm: weight ",
                    weight->layout, " must be [", x->dim(-1), "]");
  }
  MLA_CHECK_SHAPE(attrs.eps >= 0, "rms_norm: eps ", attrs.eps, " is negative");
  return g.add_node(Op::rms_norm, Layout::contiguous(Format::F32, x->shape()), {x, weight}, attrs);
}

Node* rope(Graph& g, Node* x, Node* positions, Node* frequencies, RopeAttrs attrs) {
  check_float("rope", "x", x);
  check_i32("rope", "positions", positions);
  check_f32("rope", "frequencies", frequencies);
  MLA_CHECK_SHAPE(x->shape().rank == 2 || x->shape().rank == 3, "rope: x ", x->layout,
                  " must be [T, H, R] or [T, R]");
  MLA_CHECK_SHAPE(positions->shape().rank == 1 && positions->dim(0) == x->dim(0),
                  "rope: positions ", positions->layout, " must be [", x->dim(0), "]");
  MLA_CHECK_SHAPE(frequencies->shape().rank == 1 && x->dim(-1) == 2 * frequencies->dim(0),
                  "rope: frequencies ", frequencies->layout, " must be half of the rows of x ",
                  x->layout);
  return g.add_node(Op::rope, Layout::contiguous(Format::F32, x->shape()),
                    {x, positions, frequencies}, attrs);
}

Node* softmax(Graph& g, Node* x, Node* mask, SoftmaxAttrs attrs) {
  check_float("softmax", "x", x);
  MLA_CHECK_SHAPE(x->shape().rank >= 1, "softmax: x ", x->layout, " has no dim");
  if (mask != nullptr) {
    check_f32("softmax", "mask", mask);
    broadcast(mask->layout, x->shape());  // throws where it cannot
  }
  return g.add_node(Op::softmax, Layout::contiguous(Format::F32, x->shape()), {x, mask}, attrs);
}

Node* swiglu(Graph& g, Node* gate, Node* up) {
  check_float("swiglu", "gate", gate);
  check_float("swiglu", "up", up);
  MLA_CHECK_SHAPE(gate->shape() == up->shape(), "swiglu: shapes differ: gate ", gate->layout,
                  ", up ", up->layout);
  return g.add_node(Op::swiglu, Layout::contiguous(Format::F32, gate->shape()), {gate, up});
}

}  // namespace mla
