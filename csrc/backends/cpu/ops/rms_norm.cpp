#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp rms_norm_op = {};
}  // namespace mla::cpu
