#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp swiglu_op = {};
}  // namespace mla::cpu
