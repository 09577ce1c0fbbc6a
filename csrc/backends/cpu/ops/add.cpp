#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp add_op = {};
}  // namespace mla::cpu
