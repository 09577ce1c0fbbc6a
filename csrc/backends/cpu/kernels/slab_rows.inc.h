// What the products with slabs share: rows of x in runs, and results of which the last register
// holds a part.
#pragma once

#include "backends/cpu/simd/simd.h"

namespace mla::cpu::MLA_ISA {
namespace {

// y[0, n_lanes) of one register of rows.
MLA_INLINE F32 load_lanes(const float* y, int64_t n_lanes) {
  if (n_lanes >= kLanes) return load(y);
  float lane[kLanes] = {};
  for (int64_t i = 0; i < n_lanes; ++i) lane[i] = y[i];
  return load(lane);
}
MLA_INLINE void store_lanes(float* y, int64_t n_lanes, F32 v) {
  if (n_lanes >= kLanes) return store(y, v);
  float lane[kLanes];
  store(lane, v);
  for (int64_t i = 0; i < n_lanes; ++i) y[i] = lane[i];
}

// Calls body(first, Count<n>) for runs of n <= most rows of x.
template <int n>
struct RowCount {
  static constexpr int value = n;
};
template <int most, class Body>
inline void for_runs(int n_x, const Body& body) {
  int i = 0;
  for (; i + most <= n_x; i += most) body(i, RowCount<most>{});
  if constexpr (most > 1) {
    if (i < n_x) for_runs<most - 1>(n_x - i, [&](int j, auto count) { body(i + j, count); });
  }
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
