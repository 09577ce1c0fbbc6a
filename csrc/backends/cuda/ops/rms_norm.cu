// out[.., i] = x[.., i] / sqrt(mean(x^2) + eps) * weight[i], along the innermost dim D.
//
// A block has a row; a thread keeps kHeld elements of it in registers, so that rows up to
// kMaxThreads * kHeld = 8192 are read once; the rest of longer rows is read twice.
// Squares are summed first by thread, then in a tree: a chain of at most kHeld + 10 roundings up to
// 8192; see norm.cuh.
#include "backends/cuda/kernels/norm.cuh"
#include "backends/cuda/ops/ops.h"

namespace mla::cuda {
namespace {

constexpr int kHeld = 8;  // two groups of four
constexpr int kMaxThreads = 1024;

struct RmsNorm {
  View x, out;
  const std::byte* weight;  // null: ones
  int64_t weight_stride;
  bool weight_is_constant;  // may be read before earlier kernels have ended
  bool x_by_four, weight_by_four;
  float eps;
};

__device__ const std::byte* row_of(const View& x, int64_t row) {
  const int64_t i2 = row % x.extent[2];
  const int64_t outer = row / x.extent[2];
  return x.data + outer / x.extent[1] * x.stride[0] + outer % x.extent[1] * x.stride[1] +
         i2 * x.stride[2];
}

__device__ float squares(const Four& x) {
  return fmaf(x.at[3], x.at[3], fmaf(x.at[2], x.at[2], fmaf(x.at[1], x.at[1], x.at[0] * x.at[0])));
}

__device__ void store_normed(const RmsNorm& norm, float* out, int64_t i, int64_t n, const Four& x,
                             const Four& weight, const NormFactor& factor) {
  Four y;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    y.at[j] = factor.times(x.at[j]);
    if (norm.weight != nullptr) y.at[j] *= weight.at[j];
  }
  if (i + 4 <= n && n % 4 == 0) {  // the result is contiguous
    *reinterpret_cast<float4*>(out + i) = make_float4(y.at[0], y.at[1], y.at[2], y.at[3]);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (i + j < n) out[i + j] = y.at[j];
  }
}

__device__ Four load_weight(const RmsNorm& norm, int64_t i, int64_t n) {
  if (norm.weight == nullptr) return {};
  return load_some(norm.weight, Format::F32, norm.weight_stride, norm.weight_by_four, i, n);
}

__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(RmsNorm norm) {
  __shared__ NormRoom room;
  const int64_t n = norm.x.extent[3];
  const int64_t first = 4 * int64_t{threadIdx.x};
  const int64_t step = 4 * int64_t{blockDim.x};
  if (!norm.weight_is_constant) pdl_wait();
  const Four weight[2] = {load_weight(norm, first, n), load_weight(norm, first + step, n)};
  if (norm.weight_is_constant) pdl_wait();
  const std::byte* row = row_of(norm.x, blockIdx.x);
  auto* out = reinterpret_cast<float*>(norm.out.data) + blockIdx.x * n;
  const auto load = [&](int64_t i) {
    return load_some(row, norm.x.format, norm.x.stride[3], norm.x_by_four, i, n);
  };
  const Four held[2] = {load(first), load(first + step)};
  float sum = squares(held[0]) + squares(held[1]);
  for (int64_t i = first + 2 * step; i < n; i += step) sum += squares(load(i));
  const NormFactor factor =
      norm_factor(sum, row, norm.x.stride[3], norm.x.format, n, norm.eps, room);
  store_normed(norm, out, first, n, held[0], weight[0], factor);
  store_normed(norm, out, first + step, n, held[1], weight[1], factor);
  for (int64_t i = first + 2 * step; i < n; i += step) {
    store_normed(norm, out, i, n, load(i), load_weight(norm, i, n), factor);
  }
}

void run_rms_norm(const Step& step, const CudaRun& run) {
  RmsNorm norm = {};
  norm.x = view(step.in[0]);
  norm.out = view(step.out);
  norm.eps = step.node->attr<RmsNormAttrs>().eps;
  norm.x_by_four = fours_are_aligned(norm.x.data, norm.x.format, norm.x.stride);
  if (step.in[1].data != nullptr) {
    const View weight = view(step.in[1]);
    norm.weight = weight.data;
    norm.weight_stride = weight.stride[3];
    norm.weight_by_four = fours_are_aligned(weight.data, weight.format, weight.stride);
    norm.weight_is_constant = root_of(step.node->input(1)).node->op == Op::weight;
  }
  const int64_t n = norm.x.extent[3];
  const int64_t n_rows = norm.x.extent[0] * norm.x.extent[1] * norm.x.extent[2];
  if (n == 0) return;
  const int64_t warps = (n + kHeld * kWarpThreads - 1) / (kHeld * kWarpThreads);
  const int64_t threads = std::min<int64_t>(warps * kWarpThreads, kMaxThreads);
  launch(run, rms_norm_kernel, dim3(static_cast<unsigned>(n_rows)),
         dim3(static_cast<unsigned>(threads)), 0, norm);
}

}  // namespace

const CudaOp rms_norm_op = {never_refused, no_scratch, run_rms_norm};

}  // namespace mla::cuda
