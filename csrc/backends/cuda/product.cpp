// The three operations that multiply by weights, as products.
#include "backends/cuda/product.h"

#include <algorithm>

#include "backends/cuda/packed.h"

namespace mla::cuda {
namespace {

// Strides of dims of one index are never used; zeros do not spoil alignment.
int64_t stride_of(const Tensor& t, int dim) {
  const auto i = static_cast<size_t>(dim);
  return t.shape.extent[i] == 1 ? 0 : t.stride[i];
}

int extent_of(const Tensor& t, int dim) {
  return static_cast<int>(t.shape.extent[static_cast<size_t>(dim)]);
}

Weight weight_of(const Tensor& w, bool transposed) {
  Weight out;
  out.data = w.data;
  out.format = w.format;
  out.matrix_stride[0] = stride_of(w, 0);
  out.matrix_stride[1] = stride_of(w, 1);
  out.row_stride = w.stride[2];
  out.step = w.stride[3];
  if (traits(w.format).quantized) {
    out.transposed = transposed;
  } else if (transposed) {
    std::swap(out.row_stride, out.step);
  }
  return out;
}

void set_x(Product& p, const Tensor& x) {
  p.x = x.data;
  p.x_format = x.format;
  p.x_step = x.stride[3];
}

void set_grid(Product& p, int e0, int e1, int e2) {
  p.extent[0] = e0;
  p.extent[1] = e1;
  p.extent[2] = e2;
}

// Rows as x has them.
void set_rows_of_x(Product& p, const Tensor& x) {
  set_x(p, x);
  set_grid(p, extent_of(x, 0), extent_of(x, 1), extent_of(x, 2));
  for (int i = 0; i < 3; ++i) p.x_stride[i] = stride_of(x, i);
}

void set_weight(Product& p, const Tensor& w, bool transposed) {
  p.w = weight_of(w, transposed);
  p.n = extent_of(w, transposed ? 3 : 2);
  p.k = extent_of(w, transposed ? 2 : 3);
  p.n_matrices[0] = extent_of(w, 0);
  p.n_matrices[1] = extent_of(w, 1);
}

void set_ids(Product& p, const Tensor& ids, int n_experts) {
  p.routed = true;
  p.ids = ids.data;
  p.id_stride[0] = ids.stride[2];
  p.id_stride[1] = ids.stride[3];
  p.n_experts = n_experts;
}

}  // namespace

Product matmul_product(const Step& step) {
  Product p;
  set_rows_of_x(p, step.in[0]);
  set_weight(p, step.in[1], step.node->attr<MatmulAttrs>().transpose_w);
  for (int i = 0; i < 2; ++i) p.ratio[i] = p.extent[i] / std::max(p.n_matrices[i], 1);
  const Tensor& residual = step.in[2];
  p.residual = residual.data;
  for (int i = 0; i < 3; ++i) p.residual_stride[i] = stride_of(residual, i);
  p.residual_step = residual.stride[3];
  p.has_residual = step.node->input(2) != nullptr;
  p.out = step.out.ptr<float>();
  return p;
}

Product matmul_indexed_product(const Step& step) {
  const Tensor& x = step.in[0];
  const Tensor& ids = step.in[2];
  Product p;
  set_x(p, x);
  const int n_slots = extent_of(ids, 3);
  set_grid(p, 1, extent_of(x, 1), std::max(n_slots, 1));
  p.x_stride[1] = stride_of(x, 1);
  p.x_stride[2] = stride_of(x, 2);
  set_weight(p, step.in[1], false);
  set_ids(p, ids, p.n_matrices[1]);
  p.summed = step.node->input(3) != nullptr;
  p.n_slots = p.summed ? n_slots : 1;
  if (!p.summed && n_slots == 0) p.extent[2] = 0;
  p.weights = step.in[3].data;
  p.weight_stride[0] = step.in[3].stride[2];
  p.weight_stride[1] = step.in[3].stride[3];
  p.residual = step.in[4].data;
  p.residual_stride[1] = step.in[4].stride[2];
  p.residual_step = step.in[4].stride[3];
  p.has_residual = step.node->input(4) != nullptr;
  p.out = step.out.ptr<float>();
  return p;
}

Product swiglu_matmul_product(const Step& step) {
  const Tensor& x = step.in[0];
  Product p;
  if (step.node->input(3) != nullptr) {
    set_x(p, x);
    set_grid(p, 1, extent_of(x, 2), extent_of(step.in[3], 3));
    p.x_stride[1] = stride_of(x, 2);
  } else {
    set_rows_of_x(p, x);
    for (int i = 0; i < 2; ++i) p.ratio[i] = p.extent[i];
  }
  set_weight(p, step.in[1], false);
  if (step.node->input(3) != nullptr) set_ids(p, step.in[3], p.n_matrices[1]);
  p.up = weight_of(step.in[2], false);
  p.swiglu = true;
  p.out = step.out.ptr<float>();
  return p;
}

Product product_of(const Step& step) {
  switch (step.node->op) {
    case Op::matmul:
      return matmul_product(step);
    case Op::matmul_indexed:
      return matmul_indexed_product(step);
    default:
      return swiglu_matmul_product(step);
  }
}

Precision product_precision(const Step& step) { return step.node->attr<MatmulAttrs>().precision; }

void take_norm(Product& p, const Step& norm) {
  const Tensor& x = norm.in[0];
  set_x(p, x);
  std::ranges::fill(p.x_stride, 0);  // there is one row
  p.norm.used = true;
  p.norm.eps = norm.node->attr<RmsNormAttrs>().eps;
  p.norm.weight = norm.in[1].data;
  p.norm.weight_stride = norm.in[1].stride[3];
}

Step step_without_memory(const Node& node) {
  Step step;
  step.node = &node;
  step.out = Tensor(node.layout, nullptr);
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    if (node.inputs[i] != nullptr) step.in[i] = Tensor(node.inputs[i]->layout, nullptr);
  }
  return step;
}

std::string_view weight_refusal(const Node* w) {
  return traits(w->format()).quantized ? packed_refusal(w) : "";
}

}  // namespace mla::cuda
