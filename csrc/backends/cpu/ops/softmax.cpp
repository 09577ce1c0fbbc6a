#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp softmax_op = {};
}  // namespace mla::cpu
