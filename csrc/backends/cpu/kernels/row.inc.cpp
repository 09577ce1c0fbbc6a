#include "backends/cpu/kernels.h"
#include "backends/cpu/simd/simd.h"
namespace mla::cpu::MLA_ISA {
extern const RowTable row_table;
const RowTable row_table = {};
}  // namespace mla::cpu::MLA_ISA
