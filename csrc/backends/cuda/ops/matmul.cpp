// y[.., m, n] = sum_k x[.., m, k] w[.., n, k] (+ residual[.., m, n]).
#include "backends/cuda/ops/ops.h"
#include "backends/cuda/product.h"

namespace mla::cuda {
namespace {

std::string_view refuse_matmul(const Node& node, const DeviceInfo&) {
  return weight_refusal(node.input(1));
}

size_t matmul_scratch(const Node& node, const DeviceInfo& device) {
  return product_scratch_bytes(matmul_product(step_without_memory(node)),
                               node.attr<MatmulAttrs>().precision, device);
}

}  // namespace

const CudaOp matmul_op = {refuse_matmul, matmul_scratch, run_product};

}  // namespace mla::cuda
