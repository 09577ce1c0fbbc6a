// The builders: each validates its operands and adds one node. All throw ShapeError, FormatError.
// Operands are F32 where nothing else is said; results are contiguous.
// Shapes are outermost first; `..` stands for up to two leading batch dims.
#pragma once

#include "graph/graph.h"

namespace mla {

// Views.
Node* view_permute(Graph& g, Node* x, std::span<const int> axes);
Node* view_slice(Graph& g, Node* x, int axis, int64_t begin, int64_t end);
Node* view_reshape(Graph& g, Node* x, const Shape& shape);
Node* view_broadcast(Graph& g, Node* x, const Shape& shape);

// x any float format, any strides -> F32, F16 or BF16; or any format -> the same one.
Node* copy(Graph& g, Node* x, Format format);

// a + b, same shape, any strides.
Node* add(Graph& g, Node* a, Node* b);

// table [V, D] of any weight format, ids [T] I32 -> [T, D] F32.
Node* get_rows(Graph& g, Node* table, Node* ids);

// x [.., D] any float format, any strides; weight [D] F32 or null -> F32.
Node* rms_norm(Graph& g, Node* x, Node* weight, RmsNormAttrs attrs);

// x [T, H, R] (or [T, R]) any float format, any strides; positions [T] I32; inverse frequencies
// [R/2] -> F32.
// Rotates the pairs (2i, 2i+1) by positions * frequencies.
Node* rope(Graph& g, Node* x, Node* positions, Node* frequencies, RopeAttrs attrs);

// softmax(scale * x + mask) along the last dim; x any float format, mask broadcasts to x or is
// null; any strides -> F32. Rows that are -inf throughout give zeros.
Node* softmax(Graph& g, Node* x, Node* mask, SoftmaxAttrs attrs);

// silu(gate) * up, same shape, any float formats and strides -> F32.
Node* swiglu(Graph& g, Node* gate, Node* up);

// x [.., M, K] F32, F16 or BF16, any strides; w [.., N, K] (transpose_w: [.., K, N]) any weight
// format -> [.., M, N] F32. w's leading dims divide x's; w's index = x's index / ratio.
// residual, if not null, has the result's shape and is added.
Node* matmul(Graph& g, Node* x, Node* w, MatmulAttrs attrs, Node* residual = nullptr);

// x [T, A or 1, K] any float format, w [E, N, K] any weight format, ids [T, A] I32 -> [T, A, N]:
// row (t, a) meets expert ids[t, a].
// With weights [T, A]: the weighted sum over a, [T, N], + residual [T, N] if not null.
Node* matmul_indexed(Graph& g, Node* x, Node* w, Node* ids, MatmulAttrs attrs,
                     Node* weights = nullptr, Node* residual = nullptr);

// x [.., M, K] any float format, gate and up [N, K] any weight formats -> swiglu of both products,
// [.., M, N]. With ids [T, A]: x [T, K], gate and up [E, N, K] -> [T, A, N].
Node* swiglu_matmul(Graph& g, Node* x, Node* gate, Node* up, MatmulAttrs attrs,
                    Node* ids = nullptr);

// logits [T, E] F32, bias [E] F32 or null (added for the choice, not for the weight).
// The node is I32 [T, 2, A]; ids and weights are views of it: I32 [T, A] and F32 [T, A],
// ordered by falling score (selection score, ties to the lower id).
struct Routing {
  Node* ids;
  Node* weights;
};
Routing route(Graph& g, Node* logits, Node* bias, RouteAttrs attrs);

// logits [M, V] F32, any strides. The node is I32 [M, 2 k + 1]; ids, values and totals are views of
// it: I32 [M, k] and F32 [M, k], the k largest of each row in falling order (ties to the lower id;
// NaN is below -inf), and F32 [M, 1], the sum of e^(logit - values[0]) over the row: NaN where the
// row has a NaN, or its largest is infinite.
struct Choice {
  Node* ids;
  Node* values;
  Node* totals;
};
Choice top_k(Graph& g, Node* logits, TopKAttrs attrs);

// The cache of one layer: two planes over the same cells. cache_write takes states (or views).
struct CacheNodes {
  Node* latent;  // [cells, C] F32, F16, BF16 or Q8_0
  Node* rope;    // [cells, R] F32, F16 or BF16
};
// latent [T, C], rope [T, R] F32, any strides; cells [T] I32: row t goes to cell cells[t]
// (negative: not written). Returns the cache as it is after the write.
CacheNodes cache_write(Graph& g, CacheNodes cache, Node* latent, Node* rope, Node* cells);

// One row of `spans`: consecutive tokens of one sequence, attending to that sequence's cells.
// The list ends at the first row with n_tokens == 0, or with the tensor.
struct Span {
  int32_t sequence;     // row of the block table
  int32_t first_token;  // row of q
  int32_t n_tokens;
  int32_t first_cell;  // cells of the first block to skip (dropped positions)
  int32_t n_cells;     // cells attended by the last token; token j sees n_cells - n_tokens + 1 + j
  int32_t expanded;    // 0: attend in the latent (absorbed), 1: expand keys and values
};
// q_nope [T, H, N], q_rope [T, H, R] F32 any strides; k_b [H, C, N] (or [H, N, C], see the attrs)
// and v_b [H, V, C] any weight format, any row strides; spans [S, 6] I32;
// block_table [sequences, blocks] I32: block i of a sequence holds its cells from i * block_cells
// on (counted with first_cell), at cell block_table[s][i] * block_cells of the cache.
// -> [T, H, V] F32. Tokens in no span come out as zeros.
Node* mla_attention(Graph& g, Node* q_nope, Node* q_rope, CacheNodes cache, Node* k_b, Node* v_b,
                    Node* spans, Node* block_table, AttentionAttrs attrs);

// How much each column of a weight matters. sums [G, K] F32 and counts [G] I32 are states (or
// views); the squares of x [.., M, K], any float format, any strides, are added to them, one row of
// sums per matrix of x. With ids [T, A]: x [T, A or 1, K], and row (t, a) counts for expert
// ids[t, a]. Returns the state as it is after that.
struct SquareSums {
  Node* sums;
  Node* counts;
};
SquareSums square_sums(Graph& g, SquareSums state, Node* x, Node* ids = nullptr);

}  // namespace mla
