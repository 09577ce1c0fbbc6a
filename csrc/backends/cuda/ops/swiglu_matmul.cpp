// y[.., m, n] = silu(sum_k x[.., m, k] gate[n, k]) * sum_k x[.., m, k] up[n, k]; with ids, gate and
// up are those of expert ids[t, a].
#include "backends/cuda/ops/ops.h"
#include "backends/cuda/product.h"

namespace mla::cuda {
namespace {

std::string_view refuse_swiglu(const Node& node, const DeviceInfo&) {
  const std::string_view gate = weight_refusal(node.input(1));
  return gate.empty() ? weight_refusal(node.input(2)) : gate;
}

size_t swiglu_matmul_scratch(const Node& node, const DeviceInfo& device) {
  return product_scratch_bytes(swiglu_matmul_product(step_without_memory(node)),
                               node.attr<MatmulAttrs>().precision, device);
}

}  // namespace

const CudaOp swiglu_matmul_op = {refuse_swiglu, swiglu_matmul_scratch, run_product};

}  // namespace mla::cuda
