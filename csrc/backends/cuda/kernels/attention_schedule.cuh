// Who computes what in absorbed attention: decided on the device, from the spans.
//
// The query rows of a span (token-major, heads innermost) are cut into units of `rows * fold` rows.
// A unit meets its cells in tiles of `tile_cells`. All tiles of all units stand in one line, spans
// in order, and the line is cut into as many equal pieces as there are busy blocks: SMs finish
// together whatever the mix of lengths. Where a unit is cut, its parts are merged afterwards.
//
// A part is the share of one block in one unit. Along the line each further part is of the next
// unit, of the next block, or of both, so `unit + block` numbers the parts, with gaps.
//
// Spans of few rows go to the narrow kernel (16 rows), others to the wide one (64 rows); each has a
// line of its own.
//
// Up to 32 spans, a decoded token's one above all, every warp finds the line for itself, and does
// so before it waits for the kernels ahead where spans are inputs of the graph: a list in memory
// would cost each kernel two round trips, 0.6 us each. Longer lists one block writes down.
#pragma once

#include "backends/cuda/kernels/attention_common.cuh"

namespace mla::cuda {

inline constexpr int kLatentDims = 512;
inline constexpr int kRopeDims = 64;
inline constexpr int kKeyDims = kLatentDims + kRopeDims;  // narrower models are padded with zeros
inline constexpr int kVariants = 2;
enum : int { kNarrow = 0, kWide = 1 };

// One kernel's share: 0 blocks where it is not launched.
struct AbsorbedVariant {
  int rows;          // query rows of a block: 16 or 64
  int fold;          // neighbouring blocks that take the same cells for other rows of a unit
  int n_blocks;      // most that can be busy, counted without the fold
  int tile_cells;    // 32 or 64
  int least_tiles;   // of a piece, while there are pieces enough
  int n_stages;      // tiles in shared memory; 0: Q8_0 straight from the cache, see absorbed.cuh
  std::byte* parts;  // [slots * fold, rows, kLatentDims] of the operand's type
  float* lse;        // [slots * fold, rows], base 2

  __host__ __device__ int unit_rows() const { return rows * fold; }
};

// A span of the window as one variant sees it. 32 bytes: two loads.
struct alignas(16) WorkEntry {
  int work_before, units_before;  // of the spans before it, in tiles and units
  int tiles;                      // of a unit
  int sequence, first_token, n_tokens, first_cell, n_cells;

  __device__ Span span() const { return {sequence, first_token, n_tokens, first_cell, n_cells, 0}; }
};
struct alignas(16) WorkTotals {
  int n_entries, work, units, unused;
};

// Tokens [first_token, end_token) go through the kernels together. By value to kernels.
struct AbsorbedPlan {
  int first_token, end_token;
  int widest_narrow;  // spans of more query rows than this are the wide kernel's
  AbsorbedVariant variants[kVariants];
  std::byte* q;  // [tokens * H, kKeyDims] of the operand's type
  // Of more spans than a warp has lanes:
  WorkTotals* totals;  // [kVariants]
  WorkEntry* entries;  // [kVariants][n_spans]
  int* token_entry;    // [tokens]: row of the list of spans, or one of:
  // Of batched products, see attention_batched.cuh; else null:
  __half* x;        // [H, tokens, N]
  float* x_scale;   // [H, tokens]
  __half* weights;  // [H, C, N] or [H, V, C]
  bool copies_16;   // rows of both planes begin at multiples of 16 bytes
};
enum : int { kIdleToken = -1, kOtherToken = -2 };  // in no span; in one that is not absorbed

// While a line has no more tiles, each is a piece: a block's time is then that of a tile. More
// pieces of one tile would take longer to merge than they save.
inline constexpr int kFewPieces = 64;

__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ inline bool warps_list(const AttentionArgs& a) { return a.n_spans <= 32; }

// The tokens of a span that lie in the window; the causal limits stay as they are.
__device__ inline Span clip_span(Span s, const AbsorbedPlan& plan) {
  const int before = max(plan.first_token - s.first_token, 0);
  const int after = max(s.first_token + s.n_tokens - plan.end_token, 0);
  s.n_tokens = max(s.n_tokens - before - after, 0);
  s.n_cells -= after;
  s.first_token += before;
  return s;
}

__device__ inline int variant_of(const AttentionArgs& a, const AbsorbedPlan& plan, const Span& s) {
  return s.n_tokens * a.h > plan.widest_narrow ? kWide : kNarrow;
}

__device__ inline int scan_lanes(int x) {  // inclusive
  const int lane = threadIdx.x % 32;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// Spans first .. first + 31 of the list, one per lane.
struct LaneSpans {
  Span span;     // clipped to the window
  int n_listed;  // lanes before the end of the list
  bool ended;
};
__device__ inline LaneSpans load_spans(const AttentionArgs& a, const AbsorbedPlan& plan,
                                       int first) {
  const int lane = threadIdx.x % 32;
  LoadedSpan loaded = {{}, true};
  if (first + lane < a.n_spans) loaded = load_span(a, first + lane);
  const unsigned ends = __ballot_sync(0xffffffffu, loaded.ends_list);
  return {clip_span(loaded.span, plan), ends != 0 ? __ffs(static_cast<int>(ends)) - 1 : 32,
          ends != 0};
}

// This lane's entry for variant v; totals become those with all lanes' spans.
__device__ inline WorkEntry scan_entry(const AttentionArgs& a, const AbsorbedPlan& plan, int v,
                                       const LaneSpans& spans, WorkTotals& totals) {
  const int lane = threadIdx.x % 32;
  const Span& s = spans.span;
  const bool has =
      lane < spans.n_listed && s.n_tokens > 0 && s.expanded == 0 && variant_of(a, plan, s) == v;
  const int units = has ? ceil_div(s.n_tokens * a.h, plan.variants[v].unit_rows()) : 0;
  const int tiles = ceil_div(s.n_cells, plan.variants[v].tile_cells);
  const int work = has ? units * tiles : 0;
  int work_end = work, units_end = units;
  if (a.n_spans > 1) {
    work_end = scan_lanes(work);
    units_end = scan_lanes(units);
  }
  const int last = a.n_spans > 1 ? 31 : 0;
  const WorkEntry entry = {totals.work + work_end - work,
                           totals.units + units_end - units,
                           tiles,
                           s.sequence,
                           s.first_token,
                           s.n_tokens,
                           s.first_cell,
                           s.n_cells};
  totals.work += __shfl_sync(0xffffffffu, work_end, last);
  totals.units += __shfl_sync(0xffffffffu, units_end, last);
  totals.n_entries += spans.n_listed;
  return entry;
}

// One warp writes totals and entries of both variants.
__device__ inline void list_work(const AttentionArgs& a, const AbsorbedPlan& plan) {
  const int lane = threadIdx.x % 32;
  WorkTotals totals[kVariants] = {};
  bool ended = false;
  for (int first = 0; first < a.n_spans && !ended; first += 32) {
    const LaneSpans spans = load_spans(a, plan, first);
    ended = spans.ended;
    for (int v = 0; v < kVariants; ++v) {
      const WorkEntry entry = scan_entry(a, plan, v, spans, totals[v]);
      if (lane < spans.n_listed) plan.entries[v * a.n_spans + first + lane] = entry;
    }
  }
  if (lane < kVariants) plan.totals[lane] = lane == kNarrow ? totals[kNarrow] : totals[kWide];
}

// The whole block fills token_entry.
__device__ inline void list_tokens(const AttentionArgs& a, const AbsorbedPlan& plan) {
  const int n_warps = static_cast<int>(blockDim.x) / 32;
  for (int t = threadIdx.x; t < plan.end_token - plan.first_token; t += blockDim.x) {
    plan.token_entry[t] = kIdleToken;
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  int n = 0;  // rows before the end of the list
  for (bool ended = false; n < a.n_spans && !ended;) {
    const bool ends = n + lane >= a.n_spans || a.spans[(n + lane) * a.span_stride + 2] == 0;
    const unsigned found = __ballot_sync(0xffffffffu, ends);
    ended = found != 0;
    n += ended ? __ffs(static_cast<int>(found)) - 1 : 32;
  }
  for (int i = static_cast<int>(threadIdx.x) / 32; i < n; i += n_warps) {
    const Span s = clip_span(load_span(a, i).span, plan);
    const int value = s.expanded == 0 ? i : kOtherToken;
    for (int j = lane; j < s.n_tokens; j += 32) {
      plan.token_entry[s.first_token - plan.first_token + j] = value;
    }
  }
}

// ---- the line -----------------------------------------------------------------------------------

// Blocks that share the line.
__device__ inline int busy_blocks(const AbsorbedVariant& variant, const WorkTotals& totals) {
  const int pieces = max(min(totals.work, kFewPieces), ceil_div(totals.work, variant.least_tiles));
  return min(variant.n_blocks, pieces);
}
__device__ inline int piece_begin(int work, int n_busy, int block) {
  return static_cast<int>(int64_t{work} * block / n_busy);
}
// The block whose piece has the tile at `position`: the last whose piece begins there or before.
__device__ inline int block_at(int work, int n_busy, int position) {
  return static_cast<int>(((int64_t{position} + 1) * n_busy - 1) / work);
}

__device__ inline WorkEntry load_entry(const WorkEntry* entry) {
  static_assert(sizeof(WorkEntry) == 2 * sizeof(int4));
  const auto* words = reinterpret_cast<const int4*>(entry);
  const int4 lo = words[0], hi = words[1];
  return {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
}

__device__ inline WorkEntry broadcast_entry(const WorkEntry& e, int lane) {
  const auto from = [lane](int x) { return __shfl_sync(0xffffffffu, x, lane); };
  return {from(e.work_before), from(e.units_before), from(e.tiles),      from(e.sequence),
          from(e.first_token), from(e.n_tokens),     from(e.first_cell), from(e.n_cells)};
}

// One variant's line as a warp has it: the entries of the first 32 spans, one per lane.
struct Line {
  WorkEntry mine;
  WorkTotals totals;
};
// From memory entries are asked for before it is known which one is wanted, so that one round trip
// serves both questions.
__device__ inline WorkEntry load_mine(const AttentionArgs& a, const AbsorbedPlan& plan, int v) {
  const int lane = threadIdx.x % 32;
  return load_entry(plan.entries + v * a.n_spans + min(lane, a.n_spans - 1));
}
// Warps call whole. Returns before pdl_wait() where the spans allow that.
__device__ inline Line find_line(const AttentionArgs& a, const AbsorbedPlan& plan, int v) {
  if (!a.spans_given || !warps_list(a)) pdl_wait();
  if (!warps_list(a)) return {load_mine(a, plan, v), plan.totals[v]};
  Line line = {};
  line.mine = scan_entry(a, plan, v, load_spans(a, plan, 0), line.totals);
  return line;
}

// The entry with the tile at `position`: the last that begins there or before. Warps call whole.
__device__ inline WorkEntry find_work(const AttentionArgs& a, const AbsorbedPlan& plan, int v,
                                      const Line& line, int position) {
  const int lane = threadIdx.x % 32;
  const int n_entries = line.totals.n_entries;
  const WorkEntry* entries = plan.entries + v * a.n_spans;
  int begin = 0;
  // 32 probes at a time until what is left fits one load of the warp.
  for (int n = n_entries; n > 32;) {
    const int step = ceil_div(n, 32);
    const int at = begin + lane * step;
    const bool begins = at < begin + n && entries[at].work_before <= position;
    const int last = 31 - __clz(static_cast<int>(__ballot_sync(0xffffffffu, begins)));
    n = min(step, n - last * step);
    begin += last * step;
  }
  WorkEntry entry = line.mine;
  if (n_entries > 32 && begin + lane < n_entries) entry = load_entry(entries + begin + lane);
  const bool begins = begin + lane < n_entries && entry.work_before <= position;
  const int last = 31 - __clz(static_cast<int>(__ballot_sync(0xffffffffu, begins)));
  return broadcast_entry(entry, last);
}

// Whether the block has no piece. It still waits: the next kernel waits for this one alone, and
// relies on what came before.
__device__ inline bool idles(int block, int n_busy) {
  if (block < n_busy) return false;
  pdl_wait();
  return true;
}

// Calls f(entry, unit, first tile, end tile) for what the block has of each unit, in order.
template <class Function>
__device__ inline void for_pieces(const AttentionArgs& a, const AbsorbedPlan& plan, int v,
                                  const Line& line, int block, const Function& f) {
  const int n_busy = busy_blocks(plan.variants[v], line.totals);
  const int end = piece_begin(line.totals.work, n_busy, block + 1);
  for (int at = piece_begin(line.totals.work, n_busy, block); at < end;) {
    const WorkEntry entry = find_work(a, plan, v, line, at);
    const int unit = (at - entry.work_before) / entry.tiles;
    const int tile = (at - entry.work_before) % entry.tiles;
    const int n = min(end - at, entry.tiles - tile);
    f(entry, unit, tile, tile + n);
    at += n;
  }
}

}  // namespace mla::cuda
