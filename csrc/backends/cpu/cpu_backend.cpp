#include "backends/cpu/cpu_backend.h"

#include <algorithm>
#include <array>
#include <new>

#include "backends/cpu/isa.h"
#include "backends/cpu/ops/ops.h"
#include "base/error.h"
#include "sys/affinity.h"
#include "sys/memory.h"
#include "sys/numa_memory.h"

namespace mla::cpu {
namespace {

constexpr size_t kLargeBytes = 4 << 20;  // two huge pages
constexpr size_t kAlignment = 64;        // a cache line, and the widest vector

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

// Operands that may be kept in parts: those whose rows are asked for one run at a time.
bool takes_parts(Op op, size_t operand) {
  switch (op) {
    case Op::get_rows:
      return operand == 0;
    case Op::matmul:
    case Op::matmul_indexed:
      return operand == 1;
    case Op::swiglu_matmul:
      return operand == 1 || operand == 2;
    case Op::mla_attention:
      return operand == 4 || operand == 5;
    default:
      return false;
  }
}

// Parts end between rows: what is read across rows would run over an end.
bool reads_by_rows(const Node& node, const Layout& operand) {
  const auto* attrs = std::get_if<MatmulAttrs>(&node.attrs);
  return operand.rows_are_contiguous() && operand.stride[2] > 0 &&
         (attrs == nullptr || !attrs->transpose_w);
}

// Attention reads the weights of a head at a time.
bool ends_between_heads(const Slices& slices, const Layout& operand) {
  return std::ranges::all_of(
      slices.parts, [&](const Slices::Part& part) { return part.begin % operand.stride[1] == 0; });
}

bool reaches_operands(const Node& node) {
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    Node* in = node.inputs[i];
    if (in == nullptr || !is_in_parts(in)) continue;
    if (!takes_parts(node.op, i) || !reads_by_rows(node, in->layout)) return false;
    const bool by_head = node.op == Op::mla_attention;
    if (by_head && !ends_between_heads(*root_of(in).node->slices, in->layout)) return false;
  }
  return true;
}

// What all nodes read and write: values, scratch. Page by page in turns, so that no node's memory
// has to serve them all. A system that refuses this refuses it for weights and cache as well, whose
// owners say so.
Buffer alloc_on_all_nodes(size_t bytes, const std::vector<sys::NodeShare>& shares) {
  std::vector<int> nodes;
  for (const sys::NodeShare& share : shares) {
    nodes.insert(nodes.end(), share.nodes.begin(), share.nodes.end());
  }
  auto memory = std::make_shared<sys::NodeMemory>(static_cast<int64_t>(std::max<size_t>(bytes, 1)),
                                                  nodes, sys::NodePolicy::interleave);
  return {std::shared_ptr<std::byte>(memory, memory->data()), bytes};
}

}  // namespace

CpuBackend::CpuBackend(std::shared_ptr<sys::ThreadPool> pool, std::string_view isa)
    : pool_(std::move(pool)), kernels_(select_isa(isa)) {}

bool CpuBackend::supports_op(const Node& node) const {
  const CpuOp* op = find(node.op);
  return op != nullptr && op->supports != nullptr && reaches_operands(node) &&
         op->supports(node, kernels_);
}

size_t CpuBackend::scratch_bytes(const Node& node) const {
  return find(node.op)->scratch_bytes(node, kernels_, pool_->n_threads());
}

Buffer CpuBackend::alloc(size_t bytes, Placement) {
  if (pool_->n_nodes() > 1) return alloc_on_all_nodes(bytes, pool_->nodes());
  if (bytes >= kLargeBytes) {  // pages of its own, huge ones where the system has them
    auto pages = std::make_shared<sys::Pages>(static_cast<int64_t>(bytes));
    return {std::shared_ptr<std::byte>(pages, pages->data()), bytes};
  }
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
  const sys::RunOn at_its_node(pool_->caller_cpus());
  const CpuRun run{kernels_, *pool_, scratch.data.get(), checkpoint, reads_.get()};
  for (const Step& step : steps) {
    checkpoint();
    if (step.node == nullptr) {
      copy(step.out, step.in[0]);
    } else {
      find(step.node->op)->run(step, run);
    }
    checkpoint.count_step();
  }
}

void CpuBackend::count_reads(bool on) {
  reads_ = on ? std::make_unique<ReadLog>(pool_->n_threads()) : nullptr;
}

std::vector<ReadLog::Traffic> CpuBackend::take_reads() {
  return reads_ != nullptr ? reads_->take() : std::vector<ReadLog::Traffic>();
}

}  // namespace mla::cpu
