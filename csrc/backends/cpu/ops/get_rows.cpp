#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp get_rows_op = {};
}  // namespace mla::cpu
