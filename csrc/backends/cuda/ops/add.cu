// out = a + b.
#include "backends/cuda/kernels/elementwise.cuh"
#include "backends/cuda/ops/ops.h"

namespace mla::cuda {
namespace {

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};

void run_add(const Step& step, const CudaRun& run) {
  const View b = view(step.in[1]);
  run_elementwise<Add>(run, view(step.out), view(step.in[0]), &b);
}

}  // namespace

const CudaOp add_op = {never_refused, no_scratch, run_add};

}  // namespace mla::cuda
