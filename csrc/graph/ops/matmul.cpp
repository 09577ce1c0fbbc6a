// Shape rules of the matrix products: plain and batched, by expert, and fused with SwiGLU.
#include "base/error.h"
#include "graph/ops.h"
#include "graph/ops/checks.h"

namespace mla {
namespace {

struct WeightDims {
  int64_t n;
  int64_t k;
};

WeightDims weight_dims(const char* op, const Node* w, const MatmulAttrs& attrs) {
  MLA_CHECK_SHAPE(w->shape().rank >= 2, op, ": w ", w->layout, " is accepted from [N, K] on");
  check_format(op, "w", w, is_weight_format(w->format()), "a weight format");
  if (attrs.transpose_w) return {w->dim(-1), w->dim(-2)};
  return {w->dim(-2), w->dim(-1)};
}

void check_residual(const char* op, const Node* residual, const Shape& out) {
  if (residual == nullptr) return;
  check_f32(op, "residual", residual);
  MLA_CHECK_SHAPE(residual->shape() == out, op, ": residual ", residual->layout,
                  " must have the result's shape ", out);
}

void check_batch(const Node* x, const Node* w) {
  for (int i = 0; i < 2; ++i) {
    const int64_t bx = x->shape().extent[i];
    const int64_t bw = w->shape().extent[i];
    MLA_CHECK_SHAPE(bw > 0 ? bx % bw == 0 : bx == 0, "matmul: leading dims of w ", w->layout,
                    " must divide those of x ", x->layout);
  }
}

// ids [T, A] against experts w [E, ..]: the values are checked when they are known, in the run.
void check_ids(const char* op, const Node* ids, int64_t n_tokens) {
  check_i32(op, "ids", ids);
  MLA_CHECK_SHAPE(ids->shape().rank == 2 && ids->dim(0) == n_tokens, op, ": ids ", ids->layout,
                  " must be [T, A] with T = ", n_tokens);
}

}  // namespace

Node* matmul(Graph& g, Node* x, Node* w, MatmulAttrs attrs, Node* residual) {
  check_float("matmul", "x", x);
  MLA_CHECK_SHAPE(x->shape().rank >= 2, "matmul: x ", x->layout, " is accepted from [M, K] on");
  const WeightDims dims = weight_dims("matmul", w, attrs);
  MLA_CHECK_SHAPE(x->dim(-1) == dims.k, "matmul: K differs: x ", x->layout, ", w ", w->layout,
                  attrs.transpose_w ? " (transposed)" : "");
  check_batch(x, w);
  Shape out = x->shape();
  out.rank = std::max(out.rank, w->shape().rank);
  out.extent[3] = dims.n;
  check_residual("matmul", residual, out);
  return g.add_node(Op::matmul, Layout::contiguous(Format::F32, out), {x, w, residual}, attrs);
}

Node* matmul_indexed(Graph& g, Node* x, Node* w, Node* ids, MatmulAttrs attrs, Node* weights,
                     Node* residual) {
  const char* op = "matmul_indexed";
  check_float(op, "x", x);
  MLA_CHECK_SHAPE(x->shape().rank == 3 && w->shape().rank == 3, op, ": x ", x->layout,
                  " must be [T, A or 1, K] and w ", w->layout, " [E, N, K]");
  const WeightDims dims = weight_dims(op, w, attrs);
  MLA_CHECK_SHAPE(!attrs.transpose_w, op, ": transposed experts are not accepted");
  MLA_CHECK_SHAPE(x->dim(2) == dims.k, op, ": K differs: x ", x->layout, ", w ", w->layout);
  check_ids(op, ids, x->dim(0));
  MLA_CHECK_SHAPE(x->dim(1) == 1 || x->dim(1) == ids->dim(1), op, ": x ", x->layout,
                  " must have 1 or A rows a token, ids are ", ids->layout);
  Shape out{x->dim(0), ids->dim(1), dims.n};
  if (weights != nullptr) {
    check_f32(op, "weights", weights);
    MLA_CHECK_SHAPE(weights->shape() == ids->shape(), op, ": weights ", weights->layout,
                    " must have the shape of ids ", ids->layout);
    out = {x->dim(0), dims.n};
  }
  MLA_CHECK_SHAPE(residual == nullptr || weights != nullptr, op,
                  ": a residual goes with weights only");
  check_residual(op, residual, out);
  return g.add_node(Op::matmul_indexed, Layout::contiguous(Format::F32, out),
                    {x, w, ids, weights, residual}, attrs);
}

Node* swiglu_matmul(Graph& g, Node* x, Node* gate, Node* up, MatmulAttrs attrs, Node* ids) {
  const char* op = "swiglu_matmul";
  check_float(op, "x", x);
  const WeightDims dims = weight_dims(op, gate, attrs);
  weight_dims(op, up, attrs);
  MLA_CHECK_SHAPE(!attrs.transpose_w, op, ": transposed weights are not accepted");
  MLA_CHECK_SHAPE(gate->shape() == up->shape(), op, ": gate ", gate->layout, " and up ", up->layout,
                  " differ");
  MLA_CHECK_SHAPE(x->shape().rank >= 2 && x->dim(-1) == dims.k, op, ": K differs: x ", x->layout,
                  ", gate ", gate->layout);
  Shape out = x->shape();
  out.extent[3] = dims.n;
  if (ids != nullptr) {
    MLA_CHECK_SHAPE(x->shape().rank == 2 && gate->shape().rank == 3, op, ": with ids, x ",
                    x->layout, " must be [T, K] and gate ", gate->layout, " [E, N, K]");
    check_ids(op, ids, x->dim(0));
    out = {x->dim(0), ids->dim(1), dims.n};
  } else {
    MLA_CHECK_SHAPE(gate->shape().rank == 2, op, ": gate ", gate->layout, " must be [N, K]");
  }
  return g.add_node(Op::swiglu_matmul, Layout::contiguous(Format::F32, out), {x, gate, up, ids},
                    attrs);
}

}  // namespace mla
