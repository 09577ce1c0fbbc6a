// The row of x of matvec.cuh in shared memory, as integers of 16 bits.
//
// A row is [high: k][low: k][scale and sum: k / 16]: x = scale * (256 high + low), the scale that
// of 16 neighbours, the sum that of their 16. What x is multiplied by may be its RMS norm
// (product.h), taken by each block for itself. Four threads have 16 neighbours; each has the
// numbers that it copied to shared memory itself, where there was room. Error: x is rounded to
// 2^-16 of the largest of its 16.
#pragma once

#include "backends/cuda/kernels/norm.cuh"
#include "backends/cuda/matvec.h"

namespace mla::cuda::matvec {

struct StagedX {
  const std::byte* high;
  const std::byte* low;
  const float2* factors;
};

__device__ __forceinline__ StagedX staged_row(const std::byte* smem, int row, int k) {
  const std::byte* at = smem + row * staged_bytes(k);
  return {at, at + k, reinterpret_cast<const float2*>(at + 2 * k)};
}

inline constexpr float kLargest = 32512.0f;  // 127 * 256: the high byte stays within its 8 bits
inline constexpr int kRun = 4;               // neighbours of a thread

struct Run {
  float at[kRun];
};

__device__ __forceinline__ Run load_run(const float* p) {
  const float4 a = *reinterpret_cast<const float4*>(p);
  return {{a.x, a.y, a.z, a.w}};
}

// The bytes at bit 8 * `byte` of four numbers.
__device__ __forceinline__ uint32_t gather_bytes(const uint32_t* v, uint32_t byte) {
  const uint32_t pair = byte | (4 + byte) << 4;
  return __byte_perm(__byte_perm(v[0], v[1], pair), __byte_perm(v[2], v[3], pair), 0x5410);
}

// All four threads of sixteen neighbours call it; `stores` is the same in them.
__device__ __forceinline__ void stage_run(const Run& run, std::byte* row, int k, int n_k,
                                          bool stores) {
  constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;
  constexpr int kOnes = 0x01010101;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  uint32_t top = 0;                      // as bits, NaN is above infinity
#pragma unroll
  for (float x : run.at) top = max(top, __float_as_uint(x) & kMagnitude);
  top = max(top, __shfl_xor_sync(kAllLanes, top, 1));
  top = max(top, __shfl_xor_sync(kAllLanes, top, 2));
  const float largest = __uint_as_float(top);
  // Below, the inverse would overflow; such numbers add nothing that float32 sums keep.
  const float inverse = largest > 1e-30f && top < kInfinity ? kLargest / largest : 0.0f;
  const float scale = top >= kInfinity ? NAN : inverse > 0.0f ? largest * (1.0f / kLargest) : 0.0f;
  uint32_t q[kRun], carried[kRun];  // the low byte is signed: the high one is that of q + 128
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    q[i] = __float_as_uint(fmaf(run.at[i], inverse, kRound));
    carried[i] = q[i] + 128;
  }
  const uint32_t high = gather_bytes(carried, 1), low = gather_bytes(q, 0);
  int sum = dp4a(static_cast<int>(high), kOnes, 0);
  sum = dp4a(static_cast<int>(low), kOnes, 256 * sum);
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  if (!stores) return;
  *reinterpret_cast<uint32_t*>(row + k) = high;
  *reinterpret_cast<uint32_t*>(row + n_k + k) = low;
  if (k % 16 == 0) {
    reinterpret_cast<float2*>(row + 2 * n_k)[k / 16] = {scale, scale * static_cast<float>(sum)};
  }
}

// All rows of x, all threads of the block; raw: [n_x * k], or nothing. A norm is that of the only
// row.
__device__ __forceinline__ void stage(const MatVec& m, float* raw, std::byte* smem) {
  const int step = kRun * kWarpThreads * m.n_warps;
  __shared__ NormRoom room;
  const int n = m.n_x * m.k, own = kRun * static_cast<int>(threadIdx.x);
  const float* x = m.x;
  if (m.copies_x) {
#pragma unroll 1
    for (int i = own; i < n; i += step) cp_async16(raw + i, x + i);
    cp_async_commit();
    cp_async_wait<0>();
    x = raw;
  }
  NormFactor factor;
  if (m.norm.used) {
    float sum = 0.0f;
#pragma unroll 1
    for (int i = own; i < n; i += step) {
      const Run run = load_run(x + i);
#pragma unroll
      for (float x : run.at) sum = fmaf(x, x, sum);
    }
    factor = norm_factor(sum, reinterpret_cast<const std::byte*>(m.x), sizeof(float), Format::F32,
                         m.k, m.norm.eps, room);
  }
#pragma unroll 1
  for (int first = 0; first < n; first += step) {  // whole warps shuffle
    const int i = first + own;
    const bool stores = i < n;
    Run run = {};
    if (stores) run = load_run(x + i);
    if (stores && m.norm.used) {
      const Run weights = load_run(reinterpret_cast<const float*>(m.norm.weight) + i);
#pragma unroll
      for (int e = 0; e < kRun; ++e) run.at[e] = factor.times(run.at[e]) * weights.at[e];
    }
    const int row = m.n_x > 1 ? i / m.k : 0;
    stage_run(run, smem + row * staged_bytes(m.k), i - row * m.k, m.k, stores);
  }
  __syncthreads();
}

// Nothing waits for constants.
__device__ __forceinline__ void fetch_norm(const MatVec& m) {
  constexpr int kLine = 128;
  const int at = kLine * static_cast<int>(threadIdx.x);
  if (m.norm.used && at < 4 * m.k) prefetch_l2(m.norm.weight + at);
}

}  // namespace mla::cuda::matvec
