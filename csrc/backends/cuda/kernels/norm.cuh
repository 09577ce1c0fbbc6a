// The factor of an RMS norm, 1 / sqrt(mean(x^2) + eps), of a row that a block has summed.
//
// Squares are summed in float32; where they leave its range, the sum is taken again in double, and
// so is the product with the factor. Error against float64: 4 units in the last place.
#pragma once

#include "backends/cuda/kernels/elements.cuh"

namespace mla::cuda {

// Elements i .. i + 3 of a row of n; zeros from the end on.
__device__ __forceinline__ Four load_some(const std::byte* row, Format format, int64_t stride,
                                          bool by_four, int64_t i, int64_t n) {
  if (by_four && i + 4 <= n) return load_four(row + i * stride, format);
  Four out = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (i + j < n) out.at[j] = load_element(row + (i + j) * stride, format);
  }
  return out;
}

struct NormFactor {
  float factor = 1.0f;
  double wide = 0.0;  // not 0: instead of the other
  __device__ __forceinline__ float times(float x) const {
    return wide == 0.0 ? x * factor : static_cast<float>(x * wide);
  }
};

// What the warps of a block, at most 32, hand to each other.
struct NormRoom {
  float sums[kWarpThreads];
  double wide[kWarpThreads];
};

__device__ inline double block_sum_double(double x, double* smem32) {
  for (int step = kWarpThreads / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  if (lane_id() == 0) smem32[warp_id()] = x;
  __syncthreads();
  x = 0;
  const int n_warps = static_cast<int>(blockDim.x) / kWarpThreads;
  for (int i = 0; i < n_warps; ++i) x += smem32[i];
  return x;
}

// sum: of the squares that this thread has seen. All threads of the block; the same in each.
__device__ inline NormFactor norm_factor(float sum, const std::byte* row, int64_t stride,
                                         Format format, int64_t n, float eps, NormRoom& room) {
  sum = block_sum(sum, room.sums);
  // Squares below 2^-126 lose digits, but not against a sum, or eps, that is 2^40 times that.
  const float smallest = 0x1p-86f;
  const bool in_range = sum < 0x1p127f && (sum > smallest || eps > smallest);
  if (in_range) return {1.0f / sqrtf(sum / static_cast<float>(n) + eps)};
  double wide = 0;  // NaN comes this way too
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const double value = load_element(row + i * stride, format);
    wide += value * value;
  }
  const double root = sqrt(block_sum_double(wide, room.wide) / static_cast<double>(n) + eps);
  // Zeros stay zeros; NaN stays.
  return {0.0f, root > 0 ? 1.0 / root : root == 0 ? 0.0 : root};
}

}  // namespace mla::cuda
