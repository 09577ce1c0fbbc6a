#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp rope_op = {};
}  // namespace mla::cpu
