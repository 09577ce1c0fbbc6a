// The one constant an ISA's object library is entered through.
#include "backends/cpu/kernels.h"

#define MLA_TEXT_(x) #x
#define MLA_TEXT(x) MLA_TEXT_(x)

namespace mla::cpu::MLA_ISA {

extern const MatmulTable matmul_table;
extern const SlabTable slab_table;
extern const RowTable row_table;
extern const AttentionTable attention_table;
extern const EncodeTable encode_table;
extern const ProbeTable probe_table;

extern const KernelTable kernel_table;
const KernelTable kernel_table = {MLA_TEXT(MLA_ISA) + sizeof("isa_") - 1,
                                  &matmul_table,
                                  &slab_table,
                                  &row_table,
                                  &attention_table,
                                  &encode_table,
                                  &probe_table};

}  // namespace mla::cpu::MLA_ISA
