// out = silu(gate) * up.
#include "backends/cuda/kernels/elementwise.cuh"
#include "backends/cuda/kernels/math.cuh"
#include "backends/cuda/ops/ops.h"

namespace mla::cuda {
namespace {

struct Swiglu {
  __device__ float operator()(float gate, float up) const { return silu_exact(gate) * up; }
};

void run_swiglu(const Step& step, const CudaRun& run) {
  const View up = view(step.in[1]);
  run_elementwise<Swiglu>(run, view(step.out), view(step.in[0]), &up);
}

}  // namespace

const CudaOp swiglu_op = {never_refused, no_scratch, run_swiglu};

}  // namespace mla::cuda
