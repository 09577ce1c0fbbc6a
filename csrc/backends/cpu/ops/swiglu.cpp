// out = silu(gate) * up.
#include "backends/cpu/ops/rows.h"

namespace mla::cpu {
namespace {

void run_swiglu(const Step& step, const CpuRun& run) {
  run_pairs(step, run, run.kernels.row->swiglu);
}

}  // namespace

const CpuOp swiglu_op = {always, no_scratch, run_swiglu};

}  // namespace mla::cpu
