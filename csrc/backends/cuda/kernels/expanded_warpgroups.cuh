// The kernel of attention_expanded.cuh for capability 9.0: the same formula, shapes and errors.
//
// Heads of 128 + 64 and 128 numbers. A block has 128 queries of one head, 64 for each of two
// warpgroups that multiply, and a third group whose first two warps copy keys, the others values,
// 128 cells at a time into two stages each:
//
//   shared  Q [128][192], K 2 x [128][192], V 2 x [128][128] as panels (warpgroup.cuh): 208 KB
//   step j  S_j = Q K_j^T and O += P_{j-1} V_{j-1} are under way together; the softmax of S_j is
//           taken while the second still is
//
// Groups meet at named barriers alone: `full` says that a stage has come, to each multiplying group
// for itself, so that neither waits for the other; `empty` that both have done with it. Jobs reach
// the multiplying groups through a ring, with the first keys of each.
#pragma once

#include "backends/cuda/kernels/expanded_rows.cuh"
#include "backends/cuda/kernels/warpgroup.cuh"

namespace mla::cuda {

struct ExpandedWarpgroups : ExpandedDims<1, 128, 128, 64, 128> {
  static constexpr int kRows = 128;  // queries of a block
  static constexpr int kThreads = 384;
};

namespace warpgroups {

using D = ExpandedWarpgroups;
inline constexpr int kGroupThreads = 128;
inline constexpr int kGroups = 2;        // that multiply: warps 0..7
inline constexpr int kCopyThreads = 64;  // that copy keys, and as many values
inline constexpr int kPanelBytes = 128 * 128;
inline constexpr int kQueryPanels = (D::kNope + D::kRope) / 64;
inline constexpr int kKeyBytes = kQueryPanels * kPanelBytes;
inline constexpr int kValueBytes = D::kValue / 64 * kPanelBytes;
inline constexpr int kStages = 2;
inline constexpr size_t kSmemBytes =
    static_cast<size_t>(kKeyBytes + kStages * (kKeyBytes + kValueBytes));
// Copying warps run two jobs ahead at most: each job has a stage, and there are two.
inline constexpr int kJobs = 4;
// 65536 registers for 384 threads: 168 each at the start, then by need.
inline constexpr int kMultiplyRegisters = 224, kCopyRegisters = 56;
static_assert(kMultiplyRegisters * 256 + kCopyRegisters * 128 <= 65536);

// Named barriers 1..15.
inline constexpr int kFullThreads = kCopyThreads + kGroupThreads;
inline constexpr int kEmptyThreads = kCopyThreads + kGroups * kGroupThreads;
__device__ inline int full_keys(int step, int group) { return 1 + step % kStages * 2 + group; }
__device__ inline int full_values(int step, int group) { return 5 + step % kStages * 2 + group; }
__device__ inline int empty_keys(int step) { return 9 + step % kStages; }
__device__ inline int empty_values(int step) { return 11 + step % kStages; }
__device__ inline int queries_there(int group) { return 13 + group; }
inline constexpr int kJobThere = 15;  // among the copying warps

struct Shared {
  std::byte *q, *k, *v;
  ExpandedJob* jobs;  // [kJobs]; the last has no cells
  float* factors;     // [D::kRows]
};

__device__ inline int panel_at(int row, int piece) {
  return piece / 8 * kPanelBytes + piece_at(row, piece % 8, 128);
}

// ---- copying warps ------------------------------------------------------------------------------
// 128 rows of kPieces 16-byte pieces by kCopyThreads threads.
template <int kPieces>
__device__ inline void copy_panels(std::byte* stage, int first_piece, const __half* src,
                                   int64_t row_elems) {
  constexpr int kRowsAtOnce = kCopyThreads / kPieces;
  const int thread = static_cast<int>(threadIdx.x) % kCopyThreads;
  const int piece = thread % kPieces;
  const __half* from = src + thread / kPieces * row_elems + piece * 8;
#pragma unroll 8
  for (int row = thread / kPieces; row < D::kKeys; row += kRowsAtOnce) {
    cp_async16(stage + panel_at(row, first_piece + piece), from);
    from += kRowsAtOnce * row_elems;
  }
}

// What this thread copied has come, and each multiplying group may know.
__device__ inline void announce(int first_barrier) {
  cp_async_commit();
  cp_async_wait<0>();
  fence_shared_products();
  for (int group = 0; group < kGroups; ++group) bar_arrive(first_barrier + group, kFullThreads);
}

__device__ inline void copy_keys(const ExpandedArgs& a, const ExpandedJob& job, int first,
                                 std::byte* stage) {
  const int64_t row = job.row + first;
  const __half* keys = a.keys + row * a.row_elems + job.head * D::kNope;
  copy_panels<D::kNope / 8>(stage, 0, keys, a.row_elems);
  copy_panels<D::kRope / 8>(stage, D::kNope / 8, a.rope + row * D::kRope, D::kRope);
}

__device__ inline void copy_values(const ExpandedArgs& a, const ExpandedJob& job, int first,
                                   std::byte* stage) {
  const __half* values = a.values + (job.row + first) * a.row_elems + job.head * D::kValue;
  copy_panels<D::kValue / 8>(stage, 0, values, a.row_elems);
}

// The next job with cells in this round, or one without where there is none. `next` is the item
// that the counter gave; the one after it is asked for early, as the answer takes a while.
__device__ inline ExpandedJob take_job(const ExpandedArgs& a, int n_items, int& next) {
  ExpandedJob job = {};
  while (next < n_items) {
    job = find_job(a, next);
    next = atomicAdd(&a.plan.counters[a.round], 1);
    if (job.begin < job.end) return job;
  }
  job.begin = job.end = 0;
  return job;
}

__device__ inline void copy_steps(const ExpandedArgs& a, const Shared& shared) {
  const bool takes_keys = threadIdx.x < kGroups * kGroupThreads + kCopyThreads;
  const bool leads = threadIdx.x == kGroups * kGroupThreads;
  const int n_items = *a.plan.n_tiles * a.h;
  int next = leads ? atomicAdd(&a.plan.counters[a.round], 1) : 0;
  int step = 0;
  for (int n_jobs = 0;; ++n_jobs) {
    ExpandedJob& job = shared.jobs[n_jobs % kJobs];
    if (leads) job = take_job(a, n_items, next);
    bar_sync(kJobThere, 2 * kCopyThreads);
    if (job.begin >= job.end) break;
    for (int first = 0; first < job.end - job.begin; first += D::kKeys, ++step) {
      if (takes_keys) {
        if (step >= kStages) bar_sync(empty_keys(step), kEmptyThreads);
        copy_keys(a, job, first, shared.k + step % kStages * kKeyBytes);
        announce(full_keys(step, 0));
      } else {
        if (step >= kStages) bar_sync(empty_values(step), kEmptyThreads);
        copy_values(a, job, first, shared.v + step % kStages * kValueBytes);
        announce(full_values(step, 0));
      }
    }
  }
  // The job without cells comes like one with them. Every arrival at a barrier is waited for.
  if (takes_keys) {
    if (step >= kStages) bar_sync(empty_keys(step), kEmptyThreads);
    announce(full_keys(step, 0));
    if (step >= 1) bar_sync(empty_keys(step - 1), kEmptyThreads);
  } else {
    if (step >= 2) bar_sync(empty_values(step - 2), kEmptyThreads);
    if (step >= 1) bar_sync(empty_values(step - 1), kEmptyThreads);
  }
}

// ---- multiplying groups -------------------------------------------------------------------------
using Weights = uint32_t[D::kKeyTiles / 2][4];  // P as operands

__device__ __forceinline__ void start_scores(const Shared& shared, int group, int step,
                                             ExpandedScores<D>& s) {
  const SharedMatrix q = shared_matrix(shared.q + group * 64 * 128, 1024, 0);
  const SharedMatrix k = shared_matrix(shared.k + step % kStages * kKeyBytes, 1024, 0);
  warpgroup_fence();
#pragma unroll
  for (int i = 0; i < (D::kNope + D::kRope) / 16; ++i) {
    const int at = i / 4 * kPanelBytes + i % 4 * 32;
    warpgroup_mma(s[0], advance(q, at), advance(k, at), i > 0);
  }
  warpgroup_commit();
}

__device__ __forceinline__ void start_values(const Shared& shared, int step, const Weights& p,
                                             ExpandedRows<D>& rows) {
  const SharedMatrix v = shared_matrix(shared.v + step % kStages * kValueBytes, 1024, kPanelBytes);
  warpgroup_fence();
#pragma unroll
  for (int i = 0; i < D::kKeyTiles / 2; ++i) {
    warpgroup_mma(rows.o[0], p[i], advance(v, i * 16 * 128));
  }
  warpgroup_commit();
}

__device__ __forceinline__ void pack_step(const ExpandedScores<D>& s, Weights& p) {
#pragma unroll
  for (int i = 0; i < D::kKeyTiles; i += 2) pack_weights(s[0][i], s[0][i + 1], p[i / 2]);
}

// Steps of one job from number `step` on; returns that of the next.
__device__ __forceinline__ int multiply_steps(const Shared& shared, const ExpandedJob& job,
                                              int group, int step, ExpandedRows<D>& rows) {
  const int n_cells = job.end - job.begin;
  const int visible = job.tile.visible + warp_id() * D::kWarpRows - job.begin;  // first row of warp
  ExpandedScores<D> s;
  Weights p;
  float rescale[1][2];
  start_scores(shared, group, step, s);
  warpgroup_wait<0>();
  warpgroup_hold(s[0]);
  bar_arrive(empty_keys(step), kEmptyThreads);
  if (D::kKeys > visible) mask_scores<D>(visible, s);
  softmax_step<D>(shared.factors, s, rows, rescale);
  rescale_rows<D>(rescale, rows);
  pack_step(s, p);
  for (int first = D::kKeys; first < n_cells; first += D::kKeys) {
    ++step;
    bar_sync(full_keys(step, group), kFullThreads);
    start_scores(shared, group, step, s);
    bar_sync(full_values(step - 1, group), kFullThreads);
    start_values(shared, step - 1, p, rows);
    warpgroup_wait<1>();
    warpgroup_hold(s[0]);
    bar_arrive(empty_keys(step), kEmptyThreads);
    if (first + D::kKeys > visible) mask_scores<D>(visible - first, s);
    softmax_step<D>(shared.factors, s, rows, rescale);
    warpgroup_wait<0>();
    warpgroup_hold(rows.o[0]);
    bar_arrive(empty_values(step - 1), kEmptyThreads);
    rescale_rows<D>(rescale, rows);
    pack_step(s, p);
  }
  bar_sync(full_values(step, group), kFullThreads);
  start_values(shared, step, p, rows);
  warpgroup_wait<0>();
  warpgroup_hold(rows.o[0]);
  bar_arrive(empty_values(step), kEmptyThreads);
  return step + 1;
}

__device__ inline void multiply_jobs(const ExpandedArgs& a, const Shared& shared) {
  const int group = warp_id() / 4;
  const auto at = [&](int row, int piece) { return shared.q + panel_at(row, piece); };
  int step = 0;
  for (int n_jobs = 0;; ++n_jobs) {
    // Also: all of the group have done with the queries before.
    bar_sync(full_keys(step, group), kFullThreads);
    const ExpandedJob& job = shared.jobs[n_jobs % kJobs];
    if (job.begin >= job.end) return;
    load_queries<D>(a, job, at, shared.factors);
    fence_shared_products();
    bar_sync(queries_there(group), kGroupThreads);
    ExpandedRows<D> rows;
    begin_rows<D>(a, job, rows);
    step = multiply_steps(shared, job, group, step, rows);
    end_rows<D>(a, job, rows);
  }
}

}  // namespace warpgroups

// Persistent: any grid serves, one block per multiprocessor is meant.
__global__ void __launch_bounds__(ExpandedWarpgroups::kThreads, 1)
    attend_warpgroups(const __grid_constant__ ExpandedArgs a) {
#ifdef MLA_HAS_WARPGROUPS
  using namespace warpgroups;
  __shared__ ExpandedJob jobs[kJobs];
  __shared__ float factors[D::kRows];
  pdl_wait();
  if (a.plan.rows[a.round] == 0) return;
  std::byte* q = dynamic_smem();
  const Shared shared = {q, q + kKeyBytes, q + (1 + kStages) * kKeyBytes, jobs, factors};
  if (warp_id() < kGroups * 4) {
    take_registers<kMultiplyRegisters>();
    multiply_jobs(a, shared);
  } else {
    give_registers<kCopyRegisters>();
    copy_steps(a, shared);
  }
#endif
}

}  // namespace mla::cuda
