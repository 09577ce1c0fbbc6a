// out = a + b.
#include "backends/cpu/ops/rows.h"

namespace mla::cpu {
namespace {

void run_add(const Step& step, const CpuRun& run) { run_pairs(step, run, run.kernels.row->add); }

}  // namespace

const CpuOp add_op = {always, no_scratch, run_add};

}  // namespace mla::cpu
