// The one constant an ISA's object library is entered through.
#include "backends/cpu/kernels.h"

#define MLA_TEXT_(x) #x
#define MLA_TEXT(x) MLA_TEXT_(x)

#ifndef MLA_ISA_OF_THE_REST
#define MLA_ISA_OF_THE_REST MLA_ISA  // where kernels are that this ISA has no own of
#endif

namespace mla::cpu::MLA_ISA_OF_THE_REST {
extern const MatmulTable matmul_table;
extern const RowTable row_table;
extern const AttentionTable attention_table;
extern const EncodeTable encode_table;
}  // namespace mla::cpu::MLA_ISA_OF_THE_REST

namespace mla::cpu::MLA_ISA {

namespace rest = MLA_ISA_OF_THE_REST;
extern const SlabTable slab_table;
extern const ProbeTable probe_table;

extern const KernelTable kernel_table;
const KernelTable kernel_table = {MLA_TEXT(MLA_ISA) + sizeof("isa_") - 1,
                                  &rest::matmul_table,
                                  &slab_table,
                                  &rest::row_table,
                                  &rest::attention_table,
                                  &rest::encode_table,
                                  &probe_table};

}  // namespace mla::cpu::MLA_ISA
