// What the two modes of mla_attention share: operands, the products with k_b and v_b, scratch.
// Letters: T tokens, H heads, C latent, N/R/V head dims (nope, rope, value).
#pragma once

#include <cstdint>

#include "backends/cpu/attention_kernels.h"
#include "backends/cpu/ops/carver.h"
#include "backends/cpu/ops/ops.h"
#include "backends/cpu/ops/parts.h"
#include "graph/ops.h"

namespace mla::cpu {

// Rows that one product with k_b or v_b takes at a time: enough that decoding a weight (a few
// cycles a vector) vanishes beside multiplying with it.
inline constexpr int kProductRows = 64;

// One head's weight [n, k] (rows) or [k, n] (across), out of the [H, ..] that k_b or v_b is.
struct HeadProduct {
  MatmulKernel kernel = nullptr;
  PackRow pack = nullptr;
  int64_t packed_bytes = 0;  // of one row of k
  int64_t n = 0, k = 0;
  // Rows too short for the kernels, which take 256 weights at a time, are read as n / fold rows of
  // fold * k: those meet x once in every fold of k, zeros elsewhere.
  int64_t fold = 1;

  // y[i][0..n) = x[i] . weight of `head`, for n_rows <= kProductRows packed rows.
  void apply(const Tensor& weight, int64_t head, const std::byte* packed, float* y, int64_t y_row,
             int64_t n_rows) const;
  void pack_row(const std::byte* x, int64_t stride_bytes, std::byte* packed, int64_t row) const;

 private:
  void apply_folded(const std::byte* w, int64_t w_row_bytes, const std::byte* packed, float* y,
                    int64_t y_row, int64_t n_rows) const;
};
HeadProduct head_product(const KernelTable& kernels, const Layout& weight, bool across,
                         Precision precision);

// Everything about a node that its layouts tell.
struct AttentionShape {
  int64_t t, h, n, r, c, v;
  int64_t cp, rp, np, vp;  // padded to whole vectors
  HeadProduct q_latent;    // q_nope [N] -> latent [C], by k_b
  HeadProduct value;       // latent [C] -> value [V], by v_b
  AbsorbedKernel absorbed;
  ExpandedKernels expanded;

  HeadDims dims() const { return {n, r, c, v}; }
  int n_threads;
};
AttentionShape attention_shape(const Node& node, const KernelTable& kernels, int n_threads);

// One run of the op. in: the node's operands in the order of graph/ops/attention.cpp.
struct AttentionCall {
  const Step& step;
  const CpuRun& run;
  AttentionShape shape;
  AttentionAttrs attrs;

  const Tensor& q_nope() const { return step.in[0]; }
  const Tensor& q_rope() const { return step.in[1]; }
  const Tensor& k_b() const { return step.in[4]; }
  const Tensor& v_b() const { return step.in[5]; }
  const std::byte* q_nope(int64_t token, int64_t head) const {
    return step.in[0].at(0, token, head);
  }
  const std::byte* q_rope(int64_t token, int64_t head) const {
    return step.in[1].at(0, token, head);
  }
  float* out(int64_t token, int64_t head) const {
    return step.out.ptr<float>() + (token * shape.h + head) * shape.v;
  }
  Span span(int64_t i) const;
  CacheCells cells(const Span& span) const;
  int n_threads() const { return shape.n_threads; }
  // One head of k_b or v_b is read by this thread.
  void note_read(const Tensor& weight, int64_t head, int thread) const {
    if (run.reads == nullptr) return;
    run.reads->add(thread, weight.at(0, head, 0), weight.shape.extent[2] * weight.stride[2]);
  }
  // Where cells [begin, ..) of a span lie: the part of the cache's planes, -1 if there are none.
  int part_of(const Span& span, int64_t begin) const;
};

// Checks every span against the operands and marks its tokens; throws ShapeError with the values.
// Tokens in no span become zeros in out. marks [T]. Returns the number of spans.
int64_t check_spans(const AttentionCall& call, uint8_t* marks);

// ops/attention_absorbed.cpp: all spans that are not `expanded`.
size_t absorbed_scratch_bytes(const AttentionShape& shape);
void run_absorbed(const AttentionCall& call, int64_t n_spans, std::byte* scratch);

// ops/attention_expanded.cpp: one span.
size_t expanded_scratch_bytes(const AttentionShape& shape);
void run_expanded(const AttentionCall& call, const Span& span, std::byte* scratch);

}  // namespace mla::cpu
