// Attention over the latent cache: see graph/ops.h for the operands, attention_absorbed.cpp and
// attention_expanded.cpp for the two ways to compute it.
#include <algorithm>

#include "backends/cpu/ops/attention_common.h"

namespace mla::cpu {
namespace {

bool supports(const Node& node, const KernelTable& kernels) {
  for (size_t i : {size_t{2}, size_t{3}, size_t{4}, size_t{5}, size_t{6}, size_t{7}}) {
    if (!node.input(i)->layout.rows_are_contiguous()) return false;
  }
  const AttentionShape s = attention_shape(node, kernels, 1);
  return s.q_latent.kernel != nullptr && s.value.kernel != nullptr;
}

// Both modes may use the same scratch, one after the other; the marks stay before it.
size_t marks_bytes(const AttentionShape& s) {
  Carver carver(nullptr);
  carver.take<uint8_t>(s.t);
  return carver.used_bytes();
}

size_t scratch_bytes(const Node& node, const KernelTable& kernels, int n_threads) {
  const AttentionShape s = attention_shape(node, kernels, n_threads);
  return marks_bytes(s) + std::max(absorbed_scratch_bytes(s), expanded_scratch_bytes(s));
}

void run_mla_attention(const Step& step, const CpuRun& run) {
  const AttentionCall call = {step, run,
                              attention_shape(*step.node, run.kernels, run.pool.n_threads()),
                              step.node->attr<AttentionAttrs>()};
  if (step.out.shape.n_elems() == 0) return;
  const int64_t n_spans = check_spans(call, reinterpret_cast<uint8_t*>(run.scratch));
  std::byte* scratch = run.scratch + marks_bytes(call.shape);
  run_absorbed(call, n_spans, scratch);
  for (int64_t i = 0; i < n_spans; ++i) {
    const Span span = call.span(i);
    if (span.expanded != 0) run_expanded(call, span, scratch);
  }
}

}  // namespace

const CpuOp mla_attention_op = {supports, scratch_bytes, run_mla_attention};

}  // namespace mla::cpu
