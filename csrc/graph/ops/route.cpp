// Shape rule of the router. The result packs ids and weights, so that one node yields both.
#include "base/error.h"
#include "graph/ops.h"
#include "graph/ops/checks.h"

namespace mla {

Routing route(Graph& g, Node* logits, Node* bias, RouteAttrs a) {
  check_f32("route", "logits", logits);
  MLA_CHECK_SHAPE(logits->shape().rank == 2, "route: logits ", logits->layout, " must be [T, E]");
  const int64_t n_tokens = logits->dim(0);
  const int64_t n_experts = logits->dim(1);
  if (bias != nullptr) {
    check_f32("route", "bias", bias);
    MLA_CHECK_SHAPE(bias->shape().rank == 1 && bias->dim(0) == n_experts, "route: bias ",
                    bias->layout, " must be [", n_experts, "]");
  }
  MLA_CHECK_SHAPE(a.n_groups >= 1 && n_experts % a.n_groups == 0, "route: ", a.n_groups,
                  " groups do not divide ", n_experts, " experts");
  MLA_CHECK_SHAPE(a.n_groups_used >= 1 && a.n_groups_used <= a.n_groups, "route: ", a.n_groups_used,
                  " groups used, accepted is 1 to ", a.n_groups);
  const int64_t reachable = n_experts / a.n_groups * a.n_groups_used;
  MLA_CHECK_SHAPE(a.n_used >= 1 && a.n_used <= reachable, "route: ", a.n_used,
                  " experts a token, accepted is 1 to ", reachable);
  MLA_CHECK_SHAPE(
      a.n_groups == 1 || a.group_score == GroupScore::max || n_experts / a.n_groups >= 2,
      "route: groups of one expert have no top-2 sum");
  Node* packed = g.add_node(
      Op::route, Layout::contiguous(Format::I32, Shape{n_tokens, 2, a.n_used}), {logits, bias}, a);
  Layout half = packed->layout;
  half.shape = Shape{n_tokens, a.n_used};
  half.stride = {0, 0, packed->layout.stride[1], packed->layout.stride[3]};
  Node* ids = g.add_view(packed, half, 0);
  half.format = Format::F32;
  Node* weights = g.add_view(packed, half, packed->layout.stride[2]);
  return {ids, weights};
}

}  // namespace mla
