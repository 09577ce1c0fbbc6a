// out = softmax(scale * x + mask) along the innermost dim.
//
// A block has a row and passes over it three times: the largest z, the sum of e^(z - largest), the
// quotients; z is computed anew each time. The sum is in double. Rows that are -inf throughout give
// zeros. Error against float64: 4 + 2 |z| units in the last place, as z is rounded to float32.
#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/kernels/math.cuh"
#include "backends/cuda/ops/ops.h"

namespace mla::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kElemsPerThread = 4;  // of short rows

struct Softmax {
  View x;
  const std::byte* mask;   // null: none
  int64_t mask_stride[4];  // 0 where it broadcasts
  float* out;
  float scale;
};

struct Row {
  const std::byte *x, *mask;
};

__device__ Row row_of(const Softmax& s, int64_t row) {
  const int64_t i2 = row % s.x.extent[2];
  const int64_t i1 = row / s.x.extent[2] % s.x.extent[1];
  const int64_t i0 = row / s.x.extent[2] / s.x.extent[1];
  Row out;
  out.x = s.x.data + i0 * s.x.stride[0] + i1 * s.x.stride[1] + i2 * s.x.stride[2];
  out.mask = s.mask;
  if (s.mask != nullptr) {
    out.mask += i0 * s.mask_stride[0] + i1 * s.mask_stride[1] + i2 * s.mask_stride[2];
  }
  return out;
}

__device__ float logit(const Softmax& s, const Row& row, int64_t i) {
  const float x = load_element(row.x + i * s.x.stride[3], s.x.format);
  if (row.mask == nullptr) return x * s.scale;
  return fmaf(x, s.scale, load_element(row.mask + i * s.mask_stride[3], Format::F32));
}

__device__ double block_sum_double(double x) {
  __shared__ double partial[kMaxThreads / kWarpThreads];
  for (int step = kWarpThreads / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  if (lane_id() == 0) partial[warp_id()] = x;
  __syncthreads();
  x = 0;
  const int n_warps = static_cast<int>(blockDim.x) / kWarpThreads;
  for (int i = 0; i < n_warps; ++i) x += partial[i];
  return x;
}

__global__ void __launch_bounds__(kMaxThreads) softmax_kernel(Softmax s) {
  __shared__ float partial[kWarpThreads];
  pdl_wait();
  const int64_t n = s.x.extent[3];
  const Row row = row_of(s, blockIdx.x);
  const float lowest = -INFINITY;
  float largest = lowest;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    largest = fmaxf(largest, logit(s, row, i));
  }
  largest = block_max(largest, partial);
  // Against 0 where all is -inf: then every exponential is 0, not NaN.
  const float shift = largest == lowest ? 0.0f : largest;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    sum += exp_exact(logit(s, row, i) - shift);
  }
  sum = block_sum_double(sum);
  const float inverse = sum == 0 ? 0.0f : static_cast<float>(1.0 / sum);
  float* out = s.out + blockIdx.x * n;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    out[i] = exp_exact(logit(s, row, i) - shift) * inverse;
  }
}

void run_softmax(const Step& step, const CudaRun& run) {
  Softmax s = {};
  s.x = view(step.in[0]);
  s.out = step.out.ptr<float>();
  s.scale = step.node->attr<SoftmaxAttrs>().scale;
  if (step.in[1].data != nullptr) {
    const View mask = view(Tensor(broadcast(step.in[1], step.in[0].shape), step.in[1].data));
    s.mask = mask.data;
    std::copy(std::begin(mask.stride), std::end(mask.stride), std::begin(s.mask_stride));
  }
  const int64_t n = s.x.extent[3];
  const int64_t n_rows = s.x.extent[0] * s.x.extent[1] * s.x.extent[2];
  if (n == 0) return;
  const int64_t warps = (n + kElemsPerThread * kWarpThreads - 1) / (kElemsPerThread * kWarpThreads);
  const int64_t threads = std::min<int64_t>(warps * kWarpThreads, kMaxThreads);
  launch(run, softmax_kernel, dim3(static_cast<unsigned>(n_rows)),
         dim3(static_cast<unsigned>(threads)), 0, s);
}

}  // namespace

const CudaOp softmax_op = {never_refused, no_scratch, run_softmax};

}  // namespace mla::cuda
