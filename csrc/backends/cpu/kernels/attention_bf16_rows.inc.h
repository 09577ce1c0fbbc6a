// The softmax of attention in pairs of bf16, and a panel's whole way: see attention_bf16.inc.h, for
// attention.inc.cpp alone.
#pragma once

#if defined(MLA_ISA_AVX512AMX)
#include "backends/cpu/kernels/attention_bf16_tiles.inc.h"
#else
#include "backends/cpu/kernels/attention_bf16_vectors.inc.h"
#endif

namespace mla::cpu::MLA_ISA {
namespace {

inline void load_rows(const RunningRows& from, PairRows* t) {
  float lanes[2][kPairTileRows] = {};
  for (int64_t i = 0; i < t->n_rows; ++i) {
    lanes[0][i] = from.max[i];
    lanes[1][i] = from.sum[i];
  }
  for (int64_t g = 0; g < t->n_groups; ++g) {
    t->max[g] = load(lanes[0] + g * kLanes);
    t->sum[g] = load(lanes[1] + g * kLanes);
  }
  t->out = from.out;
  t->out_row = from.out_row;
}
inline void store_rows(const PairRows& t, const RunningRows& to) {
  for (int64_t i = 0; i < t.n_rows; ++i) {
    to.max[i] = t.max[i / kLanes][i % kLanes];
    to.sum[i] = t.sum[i / kLanes][i % kLanes];
  }
}

// How many of a panel's cells each row of a group sees; false if all of them see all n_cells.
inline bool seen_cells(const PairRows& t, int64_t group, int64_t first, int64_t n_cells,
                       I32* seen) {
  int32_t lane[kLanes];
  bool some_hidden = n_cells % 2 != 0;
  for (int64_t i = 0; i < kLanes; ++i) {
    const int64_t row = group * kLanes + i;
    const int64_t n = t.visible[row < t.n_rows ? row : t.n_rows - 1] - first;
    lane[i] = static_cast<int32_t>(n < 0 ? 0 : n < n_cells ? n : n_cells);
    some_hidden |= lane[i] < n_cells;
  }
  std::memcpy(seen, lane, sizeof lane);
  return some_hidden;
}

// Scores of one group -> weights against the maximum.
inline void weigh(PairRows* t, int64_t group, int64_t first, int64_t n_cells,
                  const PairScratch& scratch) {
  constexpr float kLog2E = 1.44269504f;
  const float lowest = -__builtin_inff();
  float* score = scratch.scores + group * kPanelCells * kLanes;
  const int64_t padded = (n_cells + 1) / 2 * 2;
  const F32 scale = set1(t->scale);
  F32 best = t->max[group];
  I32 seen;
  const bool some_hidden = seen_cells(*t, group, first, n_cells, &seen);
  for (int64_t cell = 0; cell < padded; ++cell) {
    F32 z = load(score + cell * kLanes) * scale;
    if (some_hidden) z = static_cast<int32_t>(cell) < seen ? z : set1(lowest);
    store(score + cell * kLanes, z);
    best = max(z, best);
  }
  // The maximum moves where a weight would exceed e^5: what lies below needs no factor then. A row
  // without a score above -inf yet keeps that as its maximum, and weights of 0.
  best = best > t->max[group] + set1(5.0f) ? best : t->max[group];
  const F32 base = best == lowest ? zero() : best;
  Pair* weights = scratch.weights + group * kPanelPairs * kLanes;
  // Weights are summed as they are used, rounded: what remains of their errors has mean zero.
  const I32 ones = zip_pairs(set1(1.0f), set1(1.0f));
  F32 total = zero();
  for (int64_t cell = 0; cell < padded; cell += 2) {
    const F32 even = exp2_near((load(score + cell * kLanes) - base) * set1(kLog2E));
    const F32 odd = exp2_near((load(score + (cell + 1) * kLanes) - base) * set1(kLog2E));
    const I32 pair = zip_pairs(even, odd);
    total = dot_pairs(total, pair, ones);
    store_pairs(weights + cell / 2 * kLanes, pair);
  }
  // Exactly 1 where the maximum stays: an error here would grow with every panel.
  const F32 factor = exp2_near((t->max[group] - base) * set1(kLog2E));
  t->kept[group] = best == t->max[group] ? set1(1.0f) : factor;
  t->sum[group] = t->sum[group] * t->kept[group] + total;
  t->max[group] = best;
}

// One panel of cells, of which the first is `first` as `visible` counts.
void attend_panel(PairUnit& unit, PairRows* t, const KeyPart* parts, int n_parts,
                  const Pair* values, int64_t first, int64_t n_cells, const PairScratch& scratch) {
  panel_scores(unit, parts, n_parts, t->q, n_cells, t->n_groups, scratch.scores);
  for (int64_t g = 0; g < t->n_groups; ++g) weigh(t, g, first, n_cells, scratch);
  add_panel_values(unit, *t, values, n_cells, scratch.weights);
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
