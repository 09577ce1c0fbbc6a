// What an op of the CPU backend provides. ops/<op>.cpp defines one constant of this type each.
#pragma once

#include "backends/cpu/kernels.h"
#include "backends/cpu/read_log.h"
#include "exec/backend.h"
#include "sys/thread_pool.h"

namespace mla::cpu {

struct CpuRun {
  const KernelTable& kernels;
  sys::ThreadPool& pool;
  std::byte* scratch;            // scratch_bytes(node) bytes, 64-byte aligned
  const Checkpoint& checkpoint;  // long ops call it between their phases; it may throw
  ReadLog* reads = nullptr;      // told what is read of weights; null as a rule
};

struct CpuOp {
  bool (*supports)(const Node& node, const KernelTable& kernels);
  size_t (*scratch_bytes)(const Node& node, const KernelTable& kernels, int n_threads);
  void (*run)(const Step& step, const CpuRun& run);
};

#define MLA_OP(name) extern const CpuOp name##_op;
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
MLA_OP(square_sums)
#undef MLA_OP

inline bool always(const Node&, const KernelTable&) { return true; }
inline size_t no_scratch(const Node&, const KernelTable&, int) { return 0; }

}  // namespace mla::cpu
