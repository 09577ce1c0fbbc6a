// Attention over the latent cache: see graph/ops.h for the operands, attention.h for the ways.
#include <algorithm>

#include "backends/cuda/attention.h"
#include "backends/cuda/attention_expanded.h"
#include "backends/cuda/kernels/attention_common.cuh"
#include "backends/cuda/ops/ops.h"
#include "backends/cuda/packed.h"

namespace mla::cuda {

namespace {

bool is_given(const Node* node) {
  const Op op = root_of(const_cast<Node*>(node)).node->op;
  return op == Op::input || op == Op::weight;
}

bool has_fours(const View& x) {
  constexpr int64_t kBytes = 16;
  return x.extent[3] % 32 == 0 && x.stride[3] == int64_t{sizeof(float)} &&
         reinterpret_cast<uintptr_t>(x.data) % kBytes == 0 && x.stride[1] % kBytes == 0 &&
         x.stride[2] % kBytes == 0;
}

}  // namespace

AttentionArgs attention_args(const Node& node, const Step* step) {
  const auto& attrs = node.attr<AttentionAttrs>();
  const auto operand = [&](size_t i) {
    return view(step != nullptr ? step->in[i] : Tensor(node.input(i)->layout, nullptr));
  };
  const View spans = operand(6);
  const View table = operand(7);
  const auto plane = [&](size_t i) {
    const View cache = operand(i);
    return CachePlane{cache.data, cache.stride[2], cache.format, static_cast<int>(cache.extent[3])};
  };
  AttentionArgs a = {};
  a.q_nope = operand(0);
  a.q_rope = operand(1);
  a.latent = plane(2);
  a.rope = plane(3);
  a.k_b = operand(4);
  a.v_b = operand(5);
  a.t = static_cast<int>(a.q_nope.extent[1]);
  a.h = static_cast<int>(a.q_nope.extent[2]);
  a.n = static_cast<int>(a.q_nope.extent[3]);
  a.r = static_cast<int>(a.q_rope.extent[3]);
  a.v = static_cast<int>(a.v_b.extent[2]);
  a.c = static_cast<int>(a.v_b.extent[3]);
  a.scale = attrs.scale;
  a.spans_given = is_given(node.input(6)) && is_given(node.input(7));
  a.q_fours = has_fours(a.q_nope);
  a.k_b_transposed = attrs.k_b_transposed;
  a.n_cells = node.input(2)->dim(0);
  a.spans = reinterpret_cast<const int32_t*>(spans.data);
  a.span_stride = spans.stride[2] / int64_t{sizeof(int32_t)};
  a.n_spans = static_cast<int>(spans.extent[2]);
  a.table = reinterpret_cast<const int32_t*>(table.data);
  a.table_stride = table.stride[2] / int64_t{sizeof(int32_t)};
  a.n_sequences = static_cast<int>(table.extent[2]);
  a.n_blocks = static_cast<int>(table.extent[3]);
  a.block_cells = attrs.block_cells;
  a.out = step != nullptr ? step->out.ptr<float>() : nullptr;
  return a;
}

namespace {

std::string_view refusal(const Node& node, const DeviceInfo& device) {
  for (size_t i : {size_t{2}, size_t{3}, size_t{6}, size_t{7}}) {
    if (!node.input(i)->layout.rows_are_contiguous()) return "rows of the cache are scattered";
  }
  for (size_t i : {size_t{4}, size_t{5}}) {
    if (traits(node.input(i)->format()).quantized) {
      if (const auto why = packed_refusal(node.input(i)); !why.empty()) return why;
    } else if (!node.input(i)->layout.rows_are_contiguous()) {
      return "rows of k_b or v_b are scattered";
    }
  }
  if (!exact_fits(node, device)) return "a cell of all parts exceeds the shared memory";
  return "";
}

// What each contraction of the node runs as, and whether it can occur at all.
struct Ways {
  bool absorbed, absorbed_fast, expanded, expanded_fast;
};
Ways ways(const Node& node, const DeviceInfo& device) {
  const auto& attrs = node.attr<AttentionAttrs>();
  const bool fast = attrs.precision == Precision::fast;
  return {attrs.contraction != Contraction::expanded, fast && absorbed_fits(node, device),
          attrs.contraction != Contraction::absorbed, fast && expanded_fits(node, device)};
}
// Both exact: one pass over all spans.
bool all_exact(const Ways& w) {
  return !(w.absorbed && w.absorbed_fast) && !(w.expanded && w.expanded_fast);
}

size_t scratch_bytes(const Node& node, const DeviceInfo& device) {
  const Ways w = ways(node, device);
  size_t bytes = 0;
  if (w.absorbed) {
    bytes = w.absorbed_fast ? absorbed_scratch_bytes(node, device) : exact_scratch_bytes(node);
  }
  if (w.expanded) {
    bytes = std::max(
        bytes, w.expanded_fast ? expanded_scratch_bytes(node, device) : exact_scratch_bytes(node));
  }
  return bytes;
}

// One block per token: zeros where no span has it.
__global__ void __launch_bounds__(128) zero_idle_tokens(AttentionArgs a) {
  pdl_wait();
  const int token = static_cast<int>(blockIdx.x);
  if (find_span(a, token) >= 0) return;
  float* row = a.out + int64_t{token} * a.h * a.v;
  for (int i = threadIdx.x; i < a.h * a.v; i += blockDim.x) row[i] = 0.0f;
}

void run_mla_attention(const Step& step, const CudaRun& run) {
  if (step.out.shape.n_elems() == 0) return;
  const Ways w = ways(*step.node, run.device);
  if (all_exact(w)) return attention_exact(step, run, Contraction::any);
  if (w.absorbed) {
    w.absorbed_fast ? attention_absorbed(step, run)
                    : attention_exact(step, run, Contraction::absorbed);
  } else {
    const AttentionArgs a = attention_args(step);
    launch(run, zero_idle_tokens, dim3(static_cast<unsigned>(a.t)), dim3(128), 0, a);
  }
  if (w.expanded) {
    w.expanded_fast ? attention_expanded(step, run)
                    : attention_exact(step, run, Contraction::expanded);
  }
}

}  // namespace

bool attention_takes_rope(const Node& node, const DeviceInfo& device) {
  const Ways w = ways(node, device);
  return w.absorbed && w.absorbed_fast && !w.expanded;
}

void set_rotation(AttentionArgs& a, const Step& rope) {
  a.q_rope = view(rope.in[0]);
  a.rotation = {rope.in[1].data, rope.in[2].data, rope.in[1].stride[3], rope.in[2].stride[3],
                rope.node->attr<RopeAttrs>().scale};
}

const CudaOp mla_attention_op = {refusal, scratch_bytes, run_mla_attention};

}  // namespace mla::cuda
