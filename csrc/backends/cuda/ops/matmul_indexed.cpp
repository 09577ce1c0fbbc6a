// y[t, a, n] = sum_k x[t, a or 0, k] w[ids[t, a], n, k]; with weights, their sum over a
// (+ residual[t, n]).
#include "backends/cuda/ops/ops.h"
#include "backends/cuda/product.h"

namespace mla::cuda {
namespace {

std::string_view refuse_indexed(const Node& node, const DeviceInfo&) {
  return weight_refusal(node.input(1));
}

size_t indexed_scratch(const Node& node, const DeviceInfo& device) {
  return product_scratch_bytes(matmul_indexed_product(step_without_memory(node)),
                               node.attr<MatmulAttrs>().precision, device);
}

}  // namespace

const CudaOp matmul_indexed_op = {refuse_indexed, indexed_scratch, run_product};

}  // namespace mla::cuda
