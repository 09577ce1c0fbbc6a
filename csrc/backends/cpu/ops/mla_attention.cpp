#include "backends/cpu/ops/ops.h"
namespace mla::cpu {
const CpuOp mla_attention_op = {};
}  // namespace mla::cpu
