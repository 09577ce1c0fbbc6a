// The operations of this device, one file each.
#pragma once

#include "backends/cuda/cuda_op.h"

namespace mla::cuda {

#define MLA_OP(name) extern const CudaOp name##_op;
MLA_OP(copy)
MLA_OP(add)
MLA_OP(get_rows)
MLA_OP(rms_norm)
MLA_OP(rope)
MLA_OP(softmax)
MLA_OP(swiglu)
MLA_OP(matmul)
MLA_OP(matmul_indexed)
MLA_OP(swiglu_matmul)
MLA_OP(route)
MLA_OP(top_k)
MLA_OP(cache_write)
MLA_OP(mla_attention)
#undef MLA_OP

inline std::string_view never_refused(const Node&, const DeviceInfo&) { return ""; }
inline size_t no_scratch(const Node&, const DeviceInfo&) { return 0; }

}  // namespace mla::cuda
