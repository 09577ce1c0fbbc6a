#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp matmul_indexed_op = {};
}  // namespace mla::cpu
