#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp matmul_op = {};
}  // namespace mla::cpu
