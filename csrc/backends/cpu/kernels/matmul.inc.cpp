#include "backends/cpu/kernels.h"
#include "backends/cpu/simd/simd.h"
namespace mla::cpu::MLA_ISA {
extern const MatmulTable matmul_table;
const MatmulTable matmul_table = {};
}  // namespace mla::cpu::MLA_ISA
