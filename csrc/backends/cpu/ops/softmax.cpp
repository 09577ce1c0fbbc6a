// out = softmax(scale * x + mask) along the innermost dim.
#include "backends/cpu/ops/rows.h"

namespace mla::cpu {
namespace {

constexpr int kOperands = 2;  // x and mask, where they are not contiguous float32

size_t scratch_bytes(const Node& node, const KernelTable&, int n_threads) {
  return row_scratch_bytes(node.dim(-1), kOperands, n_threads);
}

void run_softmax(const Step& step, const CpuRun& run) {
  const Tensor& x = step.in[0];
  const bool masked = step.in[1].data != nullptr;
  const Tensor mask = masked ? Tensor(broadcast(step.in[1], x.shape), step.in[1].data) : Tensor();
  const float scale = step.node->attr<SoftmaxAttrs>().scale;
  const int64_t n = x.shape.extent[3];
  if (n == 0) return;
  for_items(run, n_rows(x.shape), (2 + masked) * row_bytes(Format::F32, n),
            [&](int64_t begin, int64_t end, int thread) {
              float* room = row_scratch(run, n, kOperands, thread);
              for (int64_t row = begin; row < end; ++row) {
                const float* m =
                    masked ? as_f32(run, row_at(mask, row), mask, n, room + n) : nullptr;
                run.kernels.row->softmax(as_f32(run, row_at(x, row), x, n, room), m, scale, n,
                                         reinterpret_cast<float*>(row_at(step.out, row)));
              }
            });
}

}  // namespace

const CpuOp softmax_op = {always, scratch_bytes, run_softmax};

}  // namespace mla::cpu
