#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp route_op = {};
}  // namespace mla::cpu
