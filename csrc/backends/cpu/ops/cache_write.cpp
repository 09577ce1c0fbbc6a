#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp cache_write_op = {};
}  // namespace mla::cpu
