// What the expanded contraction does before it multiplies: a plan of the work, and cells in a row.
//
// Flat rows: the cells of all expanded spans one after the other, each span beginning at a multiple
// of kGroupCells; rows between are zero. Rounds of `cells` flat rows exist at a time, so that many
// short prompts share a round and a long context takes several. A tile is up to tile_rows tokens of
// one span; a span's tiles are listed with the longest contexts first, for the sake of balance.
//
//   plan_expanded   spans [S] -> tiles, groups, rows of each round; one block
//   gather_cells    cache [cells, C], [cells, R], any format -> f16 [rows, pad(C)], [rows, pad(R)]
//
// Error: cells of F32 and BF16 are rounded to f16, 2^-11 relative; Q8_0 likewise.
#pragma once

#include "backends/cuda/kernels/attention_common.cuh"

namespace mla::cuda {

// A multiple of the keys of a step of attention: no step meets the rows of two spans.
inline constexpr int kGroupCells = 128;
inline constexpr int kPlanThreads = 128;
inline constexpr int kGatherThreads = 256;
inline constexpr int kGatherRows = 32;  // of a block: four per warp, whose loads overlap

struct ExpandedTile {
  int token;    // row of q
  int n_rows;   // tokens of the tile
  int visible;  // cells that the first of them sees; each of the following one more
  int begin;    // flat row of the span's cell 0
};

// kGroupCells flat rows.
struct ExpandedGroup {
  int span;
  int first;    // cell of the span
  int n_cells;  // the rows that follow are zero
};

// Device memory, by value to kernels.
struct ExpandedPlan {
  ExpandedTile* tiles;    // [max_tiles]
  ExpandedGroup* groups;  // [max_groups]
  int* n_tiles;
  int* rows;      // [n_rounds]: flat rows of each round, a multiple of kGroupCells
  int* counters;  // [n_rounds]: the next item of work of each round
  int max_tiles, max_groups, n_rounds;
  int cells;  // flat rows of a round, a multiple of kGroupCells
  int tile_rows;
};

struct PlannedSpan {
  Span span;
  int first_tile, n_tiles;  // n_tiles == 0: not expanded
  int first_group, n_groups;
};

struct PlanState {
  PlannedSpan spans[kPlanThreads];
  int n_tiles, n_groups;
  bool ended;
};

__device__ inline void lay_out(const ExpandedPlan& plan, PlanState& state, int n_spans) {
  for (int i = 0; i < n_spans && !state.ended; ++i) {
    PlannedSpan& s = state.spans[i];
    state.ended = s.span.n_tokens < 0;
    if (s.span.n_tokens <= 0) continue;
    const int n_tiles = (s.span.n_tokens - 1) / plan.tile_rows + 1;
    const int n_groups = (s.span.n_cells - 1) / kGroupCells + 1;
    if (n_tiles > plan.max_tiles - state.n_tiles || n_groups > plan.max_groups - state.n_groups) {
      continue;  // only where spans overlap, which hosts refuse
    }
    s.first_tile = state.n_tiles;
    s.first_group = state.n_groups;
    s.n_tiles = n_tiles;
    s.n_groups = n_groups;
    state.n_tiles += n_tiles;
    state.n_groups += n_groups;
  }
}

__device__ inline void list_span(const ExpandedPlan& plan, const PlannedSpan& s, int index) {
  const int n_threads = static_cast<int>(blockDim.x);
  for (int i = threadIdx.x; i < s.n_tiles; i += n_threads) {
    const int first = i * plan.tile_rows;
    plan.tiles[s.first_tile + s.n_tiles - 1 - i] = {
        s.span.first_token + first, min(plan.tile_rows, s.span.n_tokens - first),
        visible_cells(s.span, first), s.first_group * kGroupCells};
  }
  for (int i = threadIdx.x; i < s.n_groups; i += n_threads) {
    const int first = i * kGroupCells;
    plan.groups[s.first_group + i] = {index, first, min(kGroupCells, s.span.n_cells - first)};
  }
}

__global__ void __launch_bounds__(kPlanThreads) plan_expanded(AttentionArgs a, ExpandedPlan plan) {
  __shared__ PlanState state;
  pdl_wait();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    state.n_tiles = state.n_groups = 0;
    state.ended = false;
  }
  for (int first = 0; first < a.n_spans; first += kPlanThreads) {
    const int n_spans = min(kPlanThreads, a.n_spans - first);
    if (thread < n_spans) {
      PlannedSpan& s = state.spans[thread];
      const LoadedSpan loaded = load_span(a, first + thread);
      s = {loaded.span, 0, 0, 0, 0};
      if (loaded.span.expanded == 0) s.span.n_tokens = 0;
      if (loaded.ends_list) s.span.n_tokens = -1;
    }
    __syncthreads();
    if (thread == 0) lay_out(plan, state, n_spans);
    __syncthreads();
    for (int i = 0; i < n_spans; ++i) list_span(plan, state.spans[i], first + i);
    __syncthreads();  // before the next spans replace these
    if (state.ended) break;
  }
  __syncthreads();
  if (thread == 0) *plan.n_tiles = state.n_tiles;
  for (int i = thread; i < plan.n_rounds; i += kPlanThreads) {
    const int64_t left = int64_t{state.n_groups} * kGroupCells - int64_t{i} * plan.cells;
    plan.rows[i] = static_cast<int>(min(max(left, int64_t{0}), int64_t{plan.cells}));
    plan.counters[i] = 0;
  }
}

// ---- gather -------------------------------------------------------------------------------------
// One row by one warp; src null: zeros.
__device__ inline void gather_row(const CachePlane& plane, const std::byte* src, __half* out,
                                  int n_padded) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool whole = plane.format == Format::F16 && plane.width == n_padded;
  if (src != nullptr && whole && reinterpret_cast<uintptr_t>(src) % 16 == 0) {
    for (int i = lane * 8; i < n_padded; i += 32 * 8) {
      *reinterpret_cast<uint4*>(out + i) = *reinterpret_cast<const uint4*>(src + i * 2);
    }
    return;
  }
#pragma unroll 2
  for (int i = lane; i < n_padded; i += 32) {
    const bool there = src != nullptr && i < plane.width;
    out[i] = __float2half_rn(there ? cache_value(src, plane.format, i) : 0.0f);
  }
}

struct GatheredCells {
  __half* latent;  // [cells, c_padded]
  __half* rope;    // [cells, r_padded]
  int c_padded, r_padded;
};

// Grid: rows of a round / kGatherRows.
__global__ void __launch_bounds__(kGatherThreads)
    gather_cells(AttentionArgs a, ExpandedPlan plan, int round, GatheredCells out) {
  pdl_wait();
  const int first = static_cast<int>(blockIdx.x) * kGatherRows;
  if (first >= plan.rows[round]) return;
  const ExpandedGroup group = plan.groups[(int64_t{round} * plan.cells + first) / kGroupCells];
  const Span span = load_span(a, group.span).span;
  for (int i = threadIdx.x / 32; i < kGatherRows; i += kGatherThreads / 32) {
    const int in_group = first % kGroupCells + i;
    const std::byte* latent = nullptr;
    const std::byte* rope = nullptr;
    if (in_group < group.n_cells) {
      const int64_t row = cache_row(a, span, group.first + in_group);
      latent = cell_at(a.latent, row);
      rope = cell_at(a.rope, row);
    }
    gather_row(a.latent, latent, out.latent + int64_t{first + i} * out.c_padded, out.c_padded);
    gather_row(a.rope, rope, out.rope + int64_t{first + i} * out.r_padded, out.r_padded);
  }
}

}  // namespace mla::cuda
