// Routed pairs in order of their expert, found on the device.
#pragma once

#include <cstdint>

#include "backends/cuda/gemm.h"

namespace mla::cuda {

inline constexpr int64_t kMaxSortedPairs = int64_t{1} << 20;

// ids [T, A] I32 (the last two dims; the others are 1), any strides. Pair p = t * A + a.
//   offsets      [n_experts + 1]: expert e has the positions offsets[e] .. offsets[e + 1]
//   sorted_pairs [T * A]: the pairs by rising expert, pairs of one expert by rising p
//   counts       [n_experts]: offsets[e + 1] - offsets[e]; may be null
// Pairs whose id lies outside [0, n_experts) come last, at positions from offsets[n_experts] on.
// n_experts <= kMaxGroupedExperts.
void expert_sort(const CudaRun& run, const View& ids, int n_experts, int* counts, int* offsets,
                 int* sorted_pairs);

// Writes NaN into the rows of c [T * A, n] (row p of pair p, ldc elements apart) whose ids are out
// of range: no product writes those. offsets_end = offsets + n_experts.
void fill_unrouted(const CudaRun& run, const int* offsets_end, const int* sorted_pairs,
                   int64_t n_pairs, float* c, int64_t ldc, int64_t n);

}  // namespace mla::cuda
