// Exact attention: weights of a group of heads decoded to float32, then
// kernels/attention_exact.cuh.
#include <algorithm>

#include "backends/cuda/attention.h"
#include "backends/cuda/kernels/attention_exact.cuh"
#include "backends/cuda/kernels/attention_weights.cuh"

namespace mla::cuda {
namespace {

// Decoded weights of a group of heads: 32 heads of C = 512, N = V = 128.
constexpr int64_t kWeightBytes = int64_t{16} << 20;

int64_t head_floats(const AttentionArgs& a) { return int64_t{a.c} * (a.n + a.v); }

int heads_at_a_time(const AttentionArgs& a) {
  const int64_t bytes = std::max<int64_t>(head_floats(a) * int64_t{sizeof(float)}, 1);
  return static_cast<int>(std::clamp<int64_t>(kWeightBytes / bytes, 1, std::max(a.h, 1)));
}

// Rows [.., k] of heads from first_head on -> float32, contiguous. Grid [head, groups / 128].
template <Format F>
__global__ void __launch_bounds__(128)
    decode_heads(View w, int first_head, int n_rows, int k, float* out) {
  pdl_wait();
  const int n_groups = (k + kGroup - 1) / kGroup;
  const int at = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (at >= n_rows * n_groups) return;
  const int64_t head = blockIdx.x;
  const int row = at / n_groups, group = at % n_groups;
  float value[kGroup];
  weight_group<F>(w.data + (first_head + head) * w.stride[1] + row * w.stride[2], k, group, value);
  float* to = out + (head * n_rows + row) * k + group * kGroup;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (group * kGroup + i < k) to[i] = value[i];
  }
}

void decode(const CudaRun& run, const View& w, int first_head, int n_heads, float* out) {
  const int n_rows = static_cast<int>(w.extent[2]);
  const int k = static_cast<int>(w.extent[3]);
  const int n_groups = n_rows * ((k + kGroup - 1) / kGroup);
  const dim3 grid(static_cast<unsigned>(n_heads), static_cast<unsigned>((n_groups + 127) / 128));
  with_weight_format(w.format, [&](auto format) {
    launch(run, decode_heads<decltype(format)::value>, grid, dim3(128), 0, w, first_head, n_rows, k,
           out);
  });
}

size_t smem_bytes(const AttentionArgs& a) {
  return static_cast<size_t>(exact_layout(a).size) * sizeof(float);
}

}  // namespace

bool exact_fits(const Node& node, const DeviceInfo& device) {
  return smem_bytes(attention_args(node, nullptr)) <= device.smem_per_block;
}

size_t exact_scratch_bytes(const Node& node) {
  const AttentionArgs a = attention_args(node, nullptr);
  return static_cast<size_t>(heads_at_a_time(a) * head_floats(a)) * sizeof(float);
}

void attention_exact(const Step& step, const CudaRun& run, Contraction spans) {
  const AttentionArgs a = attention_args(step);
  auto* weights = reinterpret_cast<float*>(run.scratch);
  const int group = heads_at_a_time(a);
  float* v_b = weights + int64_t{group} * a.c * a.n;
  for (int first = 0; first < a.h; first += group) {
    const int n = std::min(group, a.h - first);
    decode(run, a.k_b, first, n, weights);
    decode(run, a.v_b, first, n, v_b);
    const dim3 grid(static_cast<unsigned>(n),
                    static_cast<unsigned>((a.t + kExactTokens - 1) / kExactTokens));
    launch(run, exact_kernel, grid, dim3(kExactThreads), smem_bytes(a), a,
           ExactHeads{weights, v_b, first, n}, spans);
  }
}

}  // namespace mla::cuda
