#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp copy_op = {};
}  // namespace mla::cpu
