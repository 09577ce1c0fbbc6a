// Shape rules of the latent cache and of attention over it.
#include "base/error.h"
#include "graph/ops.h"
#include "graph/ops/checks.h"

namespace mla {
namespace {

bool is_latent_format(Format f) { return is_float_format(f) || f == Format::Q8_0; }

void check_cache(const char* op, const CacheNodes& cache, int64_t c, int64_t r) {
  check_format(op, "cache latent", cache.latent, is_latent_format(cache.latent->format()),
               "F32, F16, BF16 or Q8_0");
  check_float(op, "cache rope", cache.rope);
  MLA_CHECK_SHAPE(cache.latent->shape().rank == 2 && cache.rope->shape().rank == 2 &&
                      cache.latent->dim(0) == cache.rope->dim(0),
                  op, ": cache latent ", cache.latent->layout, " and rope ", cache.rope->layout,
                  " must be [cells, C] and [cells, R]");
  MLA_CHECK_SHAPE(cache.latent->dim(1) == c && cache.rope->dim(1) == r, op, ": cache rows of ",
                  cache.latent->dim(1), " + ", cache.rope->dim(1), ", accepted is ", c, " + ", r);
}

}  // namespace

CacheNodes cache_write(Graph& g, CacheNodes cache, Node* latent, Node* rope, Node* cells) {
  const char* op = "cache_write";
  check_f32(op, "latent", latent);
  check_f32(op, "rope", rope);
  check_i32(op, "cells", cells);
  MLA_CHECK_SHAPE(
      latent->shape().rank == 2 && rope->shape().rank == 2 && latent->dim(0) == rope->dim(0), op,
      ": latent ", latent->layout, " and rope ", rope->layout, " must be [T, C] and [T, R]");
  MLA_CHECK_SHAPE(cells->shape().rank == 1 && cells->dim(0) == latent->dim(0), op, ": cells ",
                  cells->layout, " must be [", latent->dim(0), "]");
  check_cache(op, cache, latent->dim(1), rope->dim(1));
  for (Node* plane : {cache.latent, cache.rope}) {
    const Op root = root_of(plane).node->op;
    MLA_CHECK_SHAPE(root == Op::state, op, ": the cache ", plane->layout, " is of the kind ",
                    op_name(root), ", accepted is state");
  }
  // The node has no data of its own; what it returns are views of the cache that come after it.
  Node* write = g.add_node(Op::cache_write, Layout::contiguous(Format::I32, Shape{0}),
                           {cache.latent, cache.rope, latent, rope, cells});
  Node* written_latent = g.add_view(cache.latent, cache.latent->layout, 0);
  Node* written_rope = g.add_view(cache.rope, cache.rope->layout, 0);
  written_latent->inputs.push_back(write);
  written_rope->inputs.push_back(write);
  return {written_latent, written_rope};
}

Node* mla_attention(Graph& g, Node* q_nope, Node* q_rope, CacheNodes cache, Node* k_b, Node* v_b,
                    Node* spans, Node* block_table, AttentionAttrs attrs) {
  const char* op = "mla_attention";
  check_f32(op, "q_nope", q_nope);
  check_f32(op, "q_rope", q_rope);
  check_i32(op, "spans", spans);
  check_i32(op, "block_table", block_table);
  check_format(op, "k_b", k_b, is_weight_format(k_b->format()), "a weight format");
  check_format(op, "v_b", v_b, is_weight_format(v_b->format()), "a weight format");
  MLA_CHECK_SHAPE(q_nope->shape().rank == 3 && q_rope->shape().rank == 3 &&
                      q_nope->dim(0) == q_rope->dim(0) && q_nope->dim(1) == q_rope->dim(1),
                  op, ": q_nope ", q_nope->layout, " and q_rope ", q_rope->layout,
                  " must be [T, H, N] and [T, H, R]");
  const int64_t heads = q_nope->dim(1);
  const int64_t nope = q_nope->dim(2);
  MLA_CHECK_SHAPE(k_b->shape().rank == 3 && v_b->shape().rank == 3, op, ": k_b ", k_b->layout,
                  " must be [H, C, N] and v_b ", v_b->layout, " [H, V, C]");
  const int64_t latent = v_b->dim(2);
  const Shape k_shape =
      attrs.k_b_transposed ? Shape{heads, nope, latent} : Shape{heads, latent, nope};
  MLA_CHECK_SHAPE(k_b->shape() == k_shape && v_b->dim(0) == heads, op, ": k_b ", k_b->layout,
                  " must be ", k_shape, " and v_b ", v_b->layout, " [", heads, ", V, ", latent,
                  "]");
  check_cache(op, cache, latent, q_rope->dim(2));
  MLA_CHECK_SHAPE(spans->shape().rank == 2 && spans->dim(1) == sizeof(Span) / sizeof(int32_t), op,
                  ": spans ", spans->layout, " must be [S, 6]");
  MLA_CHECK_SHAPE(block_table->shape().rank == 2 && attrs.block_cells > 0, op, ": block_table ",
                  block_table->layout, " must be [sequences, blocks]");
  return g.add_node(
      Op::mla_attention, Layout::contiguous(Format::F32, Shape{q_nope->dim(0), heads, v_b->dim(1)}),
      {q_nope, q_rope, cache.latent, cache.rope, k_b, v_b, spans, block_table}, attrs);
}

}  // namespace mla
