// out[i] = f(a[i], b[i]) over up to four dims, any float formats, any strides on all sides.
//
// Dims that follow each other in every operand are merged first, so that contiguous operands become
// one long row. A thread computes four neighbours where all operands lie so that they can be moved
// at once, else one element. f is computed in float32; results are rounded to nearest even.
#pragma once

#include "backends/cuda/cuda_op.h"
#include "backends/cuda/kernels/elements.cuh"

namespace mla::cuda {

inline constexpr int kElementThreads = 256;

// Where element i of a flat order lies, in each of up to three operands.
struct Walk {
  int64_t extent[4] = {1, 1, 1, 1};
  int64_t stride[3][4] = {};  // [operand][dim]
  int64_t n = 0;              // of all
};

struct WalkOffsets {
  int64_t at[3];
};

__device__ inline WalkOffsets walk_offsets(const Walk& walk, int64_t i) {
  WalkOffsets out = {};
  uint64_t rest = static_cast<uint64_t>(i);
  const bool is_small = walk.n <= 0xffffffff;  // 32-bit divisions take a fifth of the time
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    const auto extent = static_cast<uint64_t>(walk.extent[d]);
    if (extent == 1) continue;
    const uint64_t quotient =
        is_small ? static_cast<uint32_t>(rest) / static_cast<uint32_t>(extent) : rest / extent;
    const auto index = static_cast<int64_t>(rest - quotient * extent);
    rest = quotient;
#pragma unroll
    for (int o = 0; o < 3; ++o) out.at[o] += index * walk.stride[o][d];
  }
  return out;
}

// The dims of up to three operands of one shape, merged where all of them allow it. The innermost
// stays as it is if `keep_rows`.
inline Walk merged_walk(const int64_t (&extent)[4], const int64_t* const (&stride)[3],
                        bool keep_rows = false) {
  Walk walk;
  walk.n = extent[0] * extent[1] * extent[2] * extent[3];
  int to = 4;  // dims from here on are filled
  for (int d = 3; d >= 0; --d) {
    if (extent[d] == 1 && !(keep_rows && d == 3)) continue;
    bool joins = to < 4;
    for (int o = 0; o < 3 && joins; ++o) {
      joins = stride[o] == nullptr || stride[o][d] == walk.stride[o][to] * walk.extent[to];
    }
    if (joins) {
      walk.extent[to] *= extent[d];
      continue;
    }
    --to;
    walk.extent[to] = extent[d];
    for (int o = 0; o < 3; ++o) walk.stride[o][to] = stride[o] != nullptr ? stride[o][d] : 0;
  }
  return walk;
}

struct Elementwise {
  std::byte* out;
  const std::byte* a;
  const std::byte* b;  // null: f gets zeros
  Format out_format, a_format, b_format;
  int width;  // elements a thread: 4 or 1
  Walk walk;  // of groups of `width`
};

template <class F>
__global__ void __launch_bounds__(kElementThreads) elementwise_kernel(Elementwise e) {
  pdl_wait();
  const int64_t i = int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
  if (i >= e.walk.n) return;
  const WalkOffsets offset = walk_offsets(e.walk, i);
  const F f;
  if (e.width == 1) {
    const float b = e.b != nullptr ? load_element(e.b + offset.at[2], e.b_format) : 0.0f;
    store_element(e.out + offset.at[0], e.out_format,
                  f(load_element(e.a + offset.at[1], e.a_format), b));
    return;
  }
  const Four a = load_four(e.a + offset.at[1], e.a_format);
  Four b = {};
  if (e.b != nullptr) b = load_four(e.b + offset.at[2], e.b_format);
  Four out;
#pragma unroll
  for (int j = 0; j < 4; ++j) out.at[j] = f(a.at[j], b.at[j]);
  store_four(e.out + offset.at[0], e.out_format, out);
}

// b may be null.
template <class F>
void run_elementwise(const CudaRun& run, const View& out, const View& a, const View* b) {
  Walk walk = merged_walk(out.extent, {out.stride, a.stride, b != nullptr ? b->stride : nullptr});
  if (walk.n == 0) return;
  const bool by_four = walk.extent[3] % 4 == 0 &&
                       fours_are_aligned(out.data, out.format, walk.stride[0]) &&
                       fours_are_aligned(a.data, a.format, walk.stride[1]) &&
                       (b == nullptr || fours_are_aligned(b->data, b->format, walk.stride[2]));
  if (by_four) {
    walk.extent[3] /= 4;
    walk.n /= 4;
    for (auto& stride : walk.stride) stride[3] *= 4;
  }
  const Elementwise e = {out.data,        a.data,   b != nullptr ? b->data : nullptr,
                         out.format,      a.format, b != nullptr ? b->format : Format::F32,
                         by_four ? 4 : 1, walk};
  const auto n_blocks = (walk.n + kElementThreads - 1) / kElementThreads;
  launch(run, elementwise_kernel<F>, dim3(static_cast<unsigned>(n_blocks)), dim3(kElementThreads),
         0, e);
}

}  // namespace mla::cuda
