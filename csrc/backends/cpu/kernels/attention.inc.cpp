#include "backends/cpu/attention_kernels.h"
#include "backends/cpu/simd/simd.h"
namespace mla::cpu::MLA_ISA {
extern const AttentionTable attention_table;
const AttentionTable attention_table = {};
}  // namespace mla::cpu::MLA_ISA
