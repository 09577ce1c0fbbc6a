#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp swiglu_matmul_op = {};
}  // namespace mla::cpu
