// out = x / sqrt(mean(x^2) + eps) * weight, along the innermost dim.
#include "backends/cpu/ops/rows.h"

namespace mla::cpu {
namespace {

constexpr int kOperands = 2;  // x and weight, where they are not contiguous float32

size_t scratch_bytes(const Node& node, const KernelTable&, int n_threads) {
  return row_scratch_bytes(node.dim(-1), kOperands, n_threads);
}

void run_rms_norm(const Step& step, const CpuRun& run) {
  const Tensor& x = step.in[0];
  const Tensor& weight = step.in[1];
  const float eps = step.node->attr<RmsNormAttrs>().eps;
  const int64_t n = x.shape.extent[3];
  if (n == 0) return;
  for_items(run, n_rows(x.shape), 2 * row_bytes(Format::F32, n),
            [&](int64_t begin, int64_t end, int thread) {
              float* room = row_scratch(run, n, kOperands, thread);
              const float* scale =
                  weight.data != nullptr ? as_f32(run, weight.data, weight, n, room + n) : nullptr;
              for (int64_t row = begin; row < end; ++row) {
                run.kernels.row->rms_norm(as_f32(run, row_at(x, row), x, n, room), scale, eps, n,
                                          reinterpret_cast<float*>(row_at(step.out, row)));
              }
            });
}

}  // namespace

const CpuOp rms_norm_op = {always, scratch_bytes, run_rms_norm};

}  // namespace mla::cpu
