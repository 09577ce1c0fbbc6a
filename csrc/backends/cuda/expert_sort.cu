// offsets[e] = pairs of experts below e; sorted_pairs = pairs by (expert, pair).
//
// A counting sort by one block. Every warp owns a run of consecutive pairs and counts its experts
// in shared memory; running sums over (expert, warp) give each warp its first position for each
// expert; it then goes over its pairs again, 32 at a time. Lanes with the same expert find each
// other by ballots over the bits of the id and take consecutive places in lane order, so that the
// order is stable and the same every time. Pairs without an expert count as expert n_experts.
#include "backends/cuda/expert_sort.h"

#include <bit>

#include "backends/cuda/kernels/intrinsics.cuh"
#include "base/error.h"

namespace mla::cuda {
namespace {

// 32 counters per expert would fill 64 KB at 512 experts: more than any device is sure to have.
constexpr int kManyWarps = 32, kFewWarps = 24;  // more threads than experts in either case
constexpr int kManyExperts = 256;

struct Ids {
  const std::byte* data;
  int64_t n_pairs, per_token;
  int64_t token_stride, slot_stride;  // bytes
};

__device__ int expert_of(const Ids& ids, int64_t pair, int n_experts) {
  const std::byte* at =
      ids.data + pair / ids.per_token * ids.token_stride + pair % ids.per_token * ids.slot_stride;
  const int id = *reinterpret_cast<const int*>(at);
  return id >= 0 && id < n_experts ? id : n_experts;
}

// Lanes of the warp that are active and hold the same key.
__device__ unsigned lanes_alike(int key, int key_bits, bool active) {
  unsigned alike = __ballot_sync(kAllLanes, active);
  for (int bit = 0; bit < key_bits; ++bit) {
    const bool set = (key >> bit & 1) != 0;
    const unsigned with = __ballot_sync(kAllLanes, set);
    alike &= set ? with : ~with;
  }
  return alike;
}

// counts [n_experts + 1][n_warps] -> first positions; totals is one int per warp.
__device__ void first_positions(int* counts, int n_experts, int* totals, int* offsets,
                                int* expert_counts) {
  const int n_warps = static_cast<int>(blockDim.x) / kWarpThreads;
  const int expert = static_cast<int>(threadIdx.x);  // one each: blocks have more threads
  int sum = 0;
  if (expert <= n_experts) {
    for (int w = 0; w < n_warps; ++w) {
      const int n = counts[expert * n_warps + w];
      counts[expert * n_warps + w] = sum;
      sum += n;
    }
  }
  int before = sum;
  for (int step = 1; step < kWarpThreads; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, step);
    if (lane_id() >= step) before += other;
  }
  if (lane_id() == kWarpThreads - 1) totals[warp_id()] = before;
  __syncthreads();
  before -= sum;
  for (int w = 0; w < warp_id(); ++w) before += totals[w];
  if (expert > n_experts) return;
  offsets[expert] = before;
  if (expert_counts != nullptr && expert < n_experts) expert_counts[expert] = sum;
  for (int w = 0; w < n_warps; ++w) counts[expert * n_warps + w] += before;
}

__global__ void __launch_bounds__(kManyWarps* kWarpThreads)
    sort_pairs(Ids ids, int n_experts, int key_bits, int* expert_counts, int* offsets,
               int* sorted_pairs) {
  pdl_wait();
  __shared__ int totals[kManyWarps];
  int* counts = dynamic_smem<int>();
  const int n_warps = static_cast<int>(blockDim.x) / kWarpThreads;
  for (int i = static_cast<int>(threadIdx.x); i < (n_experts + 1) * n_warps;
       i += static_cast<int>(blockDim.x)) {
    counts[i] = 0;
  }
  __syncthreads();
  const int64_t groups = (ids.n_pairs + kWarpThreads - 1) / kWarpThreads;
  const int64_t per_warp = (groups + n_warps - 1) / n_warps * kWarpThreads;
  const int64_t begin = warp_id() * per_warp;
  const int64_t end = min(begin + per_warp, ids.n_pairs);
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t first = begin; first < end; first += kWarpThreads) {
      const int64_t pair = first + lane_id();
      const bool active = pair < end;
      const int expert = active ? expert_of(ids, pair, n_experts) : 0;
      const unsigned alike = lanes_alike(expert, key_bits, active);
      const int before = __popc(alike & ((1u << lane_id()) - 1u));
      int* counter = counts + expert * n_warps + warp_id();
      const int place = *counter + before;
      __syncwarp();
      if (active && pass == 1) sorted_pairs[place] = static_cast<int>(pair);
      if (active && before == 0) *counter += __popc(alike);
      __syncwarp();
    }
    __syncthreads();
    if (pass == 0) first_positions(counts, n_experts, totals, offsets, expert_counts);
    __syncthreads();
  }
}

constexpr int kFillThreads = 256;

// A block per position; all but those of the tail end at once.
__global__ void __launch_bounds__(kFillThreads)
    fill_rows(const int* begin, const int* sorted_pairs, int64_t n_pairs, float* c, int64_t ldc,
              int64_t n) {
  pdl_wait();
  for (int64_t i = *begin + int64_t{blockIdx.x}; i < n_pairs; i += gridDim.x) {
    float* row = c + sorted_pairs[i] * ldc;
    for (int64_t j = threadIdx.x; j < n; j += kFillThreads) row[j] = __int_as_float(0x7fc00000);
  }
}

}  // namespace

void expert_sort(const CudaRun& run, const View& ids, int n_experts, int* counts, int* offsets,
                 int* sorted_pairs) {
  const int64_t n_pairs = ids.extent[2] * ids.extent[3];
  MLA_CHECK_SHAPE(n_experts > 0 && n_experts <= kMaxGroupedExperts, "expert_sort: ", n_experts,
                  " experts; at most ", kMaxGroupedExperts);
  MLA_CHECK_SHAPE(n_pairs <= kMaxSortedPairs, "expert_sort: ", n_pairs, " pairs; at most ",
                  kMaxSortedPairs);
  const int64_t per_token = ids.extent[3] > 0 ? ids.extent[3] : 1;
  const int n_warps = n_experts < kManyExperts ? kManyWarps : kFewWarps;
  const size_t smem = sizeof(int) * static_cast<size_t>((n_experts + 1) * n_warps);
  const int key_bits = std::bit_width(static_cast<unsigned>(n_experts));
  launch(run, sort_pairs, dim3(1), dim3(static_cast<unsigned>(n_warps * kWarpThreads)), smem,
         Ids{ids.data, n_pairs, per_token, ids.stride[2], ids.stride[3]}, n_experts, key_bits,
         counts, offsets, sorted_pairs);
}

void fill_unrouted(const CudaRun& run, const int* offsets_end, const int* sorted_pairs,
                   int64_t n_pairs, float* c, int64_t ldc, int64_t n) {
  // Seldom more than none: a few blocks share them.
  const int64_t grid = n_pairs < 32 ? n_pairs : 32;
  if (n == 0) return;
  launch(run, fill_rows, dim3(static_cast<unsigned>(grid)), dim3(kFillThreads), 0, offsets_end,
         sorted_pairs, n_pairs, c, ldc, n);
}

}  // namespace mla::cuda
