#include "backends/cpu/cpu_backend.h"

#include <array>
#include <new>

#include "backends/cpu/isa.h"
#include "backends/cpu/ops/ops.h"
#include "base/error.h"

namespace mla::cpu {
namespace {

constexpr size_t kAlignment = 64;  // a cache line, and the widest vector

struct OpRow {
  Op op;
  const CpuOp* impl;
};
constexpr auto kOps = std::to_array<OpRow>({
    {Op::copy, &copy_op},
    {Op::add, &add_op},
    {Op::get_rows, &get_rows_op},
    {Op::rms_norm, &rms_norm_op},
    {Op::rope, &rope_op},
    {Op::softmax, &softmax_op},
    {Op::swiglu, &swiglu_op},
    {Op::matmul, &matmul_op},
    {Op::matmul_indexed, &matmul_indexed_op},
    {Op::swiglu_matmul, &swiglu_matmul_op},
    {Op::route, &route_op},
    {Op::top_k, &top_k_op},
    {Op::cache_write, &cache_write_op},
    {Op::mla_attention, &mla_attention_op},
    {Op::square_sums, &square_sums_op},
});

const CpuOp* find(Op op) {
  for (const OpRow& row : kOps) {
    if (row.op == op) return row.impl;
  }
  return nullptr;
}

}  // namespace

CpuBackend::CpuBackend(std::shared_ptr<sys::ThreadPool> pool, std::string_view isa)
    : pool_(std::move(pool)), kernels_(select_isa(isa)) {}

bool CpuBackend::supports_op(const Node& node) const {
  const CpuOp* op = find(node.op);
  return op != nullptr && op->supports != nullptr && op->supports(node, kernels_);
}

size_t CpuBackend::scratch_bytes(const Node& node) const {
  return find(node.op)->scratch_bytes(node, kernels_, pool_->n_threads());
}

Buffer CpuBackend::alloc(size_t bytes, Placement) {
  void* memory = ::operator new (bytes, std::align_val_t{kAlignment}, std::nothrow);
  MLA_CHECK(MemoryLimitError, memory != nullptr, "cpu: cannot allocate ", bytes, " bytes");
  auto release = [](std::byte* p) { ::operator delete (p, std::align_val_t{kAlignment}); };
  return {std::shared_ptr<std::byte>(static_cast<std::byte*>(memory), release), bytes};
}

void CpuBackend::copy(const Tensor& dst, const Tensor& src) {
  Node node;
  node.op = Op::copy;
  node.layout = dst;
  Step step{&node, dst, {src}};
  copy_op.run(step, {kernels_, *pool_, nullptr, [] {}});
}

void CpuBackend::run(std::span<const Step> steps, const Buffer& scratch,
                     const Checkpoint& checkpoint) {
  const CpuRun run{kernels_, *pool_, scratch.data.get(), checkpoint};
  for (const Step& step : steps) {
    checkpoint();
    if (step.node == nullptr) {
      copy(step.out, step.in[0]);
      continue;
    }
    find(step.node->op)->run(step, run);
  }
}

}  // namespace mla::cpu
