// Scales that bring sixteen runs of numbers nearest to the levels of a format: candidates around
// the widest range, each improved by least squares, the best kept.
#pragma once

#include "backends/cpu/kernels/encode_lanes.inc.h"

namespace mla::cpu::MLA_ISA {
namespace {

// Sixteen runs of N elements. They are scaled by a power of two per block, which brings the widest
// near 1: squares neither overflow nor vanish, whatever the weights' magnitude. kGroups of them
// make a block.
template <int N, int kGroups, bool kWeighted>
struct Runs {
  static constexpr int kElems = N;
  static constexpr int kPerBlock = kGroups;
  static constexpr bool kHasImportance = kWeighted;
  Lanes x[N];
  Lanes importance[kWeighted ? N : 1];
  Lanes total;     // sum of the importance
  Lanes up, down;  // what was taken out, and its inverse

  // importance of element e, times v
  MLA_INLINE Lanes weighted(int e, const Lanes& v) const {
    if constexpr (kWeighted) {
      return importance[e] * v;
    } else {
      return v;
    }
  }
};

// Candidates of a search: the range of the numbers takes as many levels as there are, and
// `tenths` / 10 more or fewer with every step from the middle one. A wider range clips the
// extremes and resolves the rest better.
struct Grid {
  int n;
  int tenths;
  constexpr float stretch(int i) const { return 0.1f * static_cast<float>(tenths * (i - n / 2)); }
};

// In a super-block the next candidate counts as better where it explains more by a small part of
// what as many levels leave over, and by more than sums are rounded. Else chance would choose among
// equals, as in runs of one number, and the runs would want scales that no common multiple meets.
template <class R>
constexpr float better_by(int n_levels) {
  if (R::kPerBlock == 1) return 1;
  const float part = 0x1p-9f / static_cast<float>(n_levels * n_levels);
  return 1 + (part > 0x1p-20f ? part : 0x1p-20f);
}

// ---- levels of symmetric formats ----------------------------------------------------------------
// x ~ scale * level. target<kWeighted>(i): where the number of largest magnitude may lie.

// Whole numbers, one more of them negative than positive: so the largest magnitude, of either sign,
// goes to the lowest level, and the scale may be negative.
template <int kLowest, Grid kPlain, Grid kImportant>
struct Integers {
  static constexpr int kCount = -2 * kLowest;
  template <bool kWeighted>
  static constexpr int candidates() {
    return kWeighted ? kImportant.n : kPlain.n;
  }
  template <bool kWeighted>
  static constexpr float target(int i) {
    return static_cast<float>(kLowest) + (kWeighted ? kImportant : kPlain).stretch(i);
  }
  MLA_INLINE static Lanes nearest(const Lanes& v) {
    return rounded(clamped(v, static_cast<float>(kLowest), static_cast<float>(-kLowest - 1)));
  }
  MLA_INLINE static Lanes code(const Lanes& v) {
    return nearest(v) - every(static_cast<float>(kLowest));
  }
};

// At 8 bits a search gains nothing that could be measured. -128 stays unused, as kernels expect.
struct SignedBytes {
  static constexpr int kCount = 255;
  template <bool kWeighted>
  static constexpr int candidates() {
    return 0;
  }
  MLA_INLINE static Lanes nearest(const Lanes& v) { return rounded(clamped(v, -127, 127)); }
  MLA_INLINE static Lanes code(const Lanes& v) { return nearest(v); }
};

// block::kIq4Levels: the largest magnitude goes near the lowest level or near the highest.
struct Iq4Levels {
  static constexpr int kPerSide = 8;
  static constexpr int kCount = 16;
  template <bool kWeighted>
  static constexpr int candidates() {
    return 2 * kPerSide;
  }
  template <bool kWeighted>
  static constexpr float target(int i) {
    const float side = i < kPerSide ? block::kIq4Levels[0] : block::kIq4Levels[15];
    return side + 2.0f * static_cast<float>(i % kPerSide - kPerSide / 2);
  }
  static constexpr float middle(int i) {
    return 0.5f * static_cast<float>(block::kIq4Levels[i] + block::kIq4Levels[i + 1]);
  }
  MLA_INLINE static Lanes nearest(const Lanes& v) {
    Lanes level = every(block::kIq4Levels[0]);
    for (int i = 0; i < 15; ++i) {
      level = where_larger(v, every(middle(i)), every(block::kIq4Levels[i + 1]), level);
    }
    return level;
  }
  MLA_INLINE static Lanes code(const Lanes& v) {
    Lanes index = every(0.0f);
    for (int i = 0; i < 15; ++i) {
      index = where_larger(v, every(middle(i)), every(static_cast<float>(i + 1)), index);
    }
    return index;
  }
};

// Sums over a run under the levels that a scale chooses.
struct ScaleSums {
  Lanes xl, ll;  // x * level, level^2

  // The part of sum(x^2) that the best scale for these levels explains is xl^2 / ll.
  MLA_INLINE void keep_better(const ScaleSums& other, float by = 1) {
    const Lanes mine = xl * xl * other.ll * every(by);
    const Lanes theirs = other.xl * other.xl * ll;
    xl = where_larger(theirs, mine, other.xl, xl);
    ll = where_larger(theirs, mine, other.ll, ll);
  }
  MLA_INLINE Lanes scale() const { return xl * inverse(ll); }
};

template <class Levels, class R>
inline ScaleSums scale_sums(const R& runs, const Lanes& per_scale) {
  ScaleSums sums = {every(0.0f), every(0.0f)};
  for (int e = 0; e < R::kElems; ++e) {
    const Lanes level = Levels::nearest(runs.x[e] * per_scale);
    const Lanes weighted = runs.weighted(e, level);
    sums.xl = sums.xl + runs.x[e] * weighted;
    sums.ll = sums.ll + level * weighted;
  }
  return sums;
}

template <class R>
inline Lanes number_of_largest_magnitude(const R& runs) {
  Lanes low = runs.x[0], high = runs.x[0];
  for (int e = 1; e < R::kElems; ++e) {
    low = lesser(low, runs.x[e]);
    high = larger(high, runs.x[e]);
  }
  return where_larger(high, every(0.0f) - low, high, low);
}

// Every step of refinement takes the levels that the best scale so far chooses.
template <class Levels, class R>
inline ScaleSums fit_scale(const R& runs, int n_refinements) {
  const Lanes widest = number_of_largest_magnitude(runs);
  constexpr bool kWeighted = R::kHasImportance;
  if constexpr (Levels::template candidates<kWeighted>() == 0) {
    return {widest, every(127.0f)};
  } else {
    const Lanes per_widest = inverse(widest);
    ScaleSums best = {every(0.0f), every(1.0f)};
    for (int i = 0; i < Levels::template candidates<kWeighted>(); ++i) {
      const Lanes target = every(Levels::template target<kWeighted>(i));
      best.keep_better(scale_sums<Levels>(runs, target * per_widest), better_by<R>(Levels::kCount));
    }
    for (int i = 0; i < n_refinements; ++i) {
      best.keep_better(scale_sums<Levels>(runs, inverse(best.scale())));
    }
    return best;
  }
}

// ---- affine formats -----------------------------------------------------------------------------
// x ~ scale * q + min, q in [0, kHighest].
struct Affine {
  Lanes scale, min;
};

struct AffineSums {
  Lanes q, qq, qy;  // of q, q^2 and q * (x - low)
};

// What all candidates of a run share: y = x - low.
struct AffineFrame {
  Lanes low, total, y;  // total importance, sum of y
};

struct AffineChoice {
  Affine found;
  Lanes gain;  // how much of sum(y^2) it explains

  MLA_INLINE void keep_better(const AffineChoice& other, float by = 1) {
    const Lanes mine = gain * every(by);
    found.scale = where_larger(other.gain, mine, other.found.scale, found.scale);
    found.min = where_larger(other.gain, mine, other.found.min, found.min);
    gain = where_larger(other.gain, mine, other.gain, gain);
  }
};

// Least squares for given q. kNegativeMin: min <= 0, as super-blocks store it.
template <bool kNegativeMin>
MLA_INLINE AffineChoice solve(const AffineFrame& frame, const AffineSums& sums) {
  const Lanes zero = every(0.0f);
  const Lanes square = frame.total * sums.qq;
  const Lanes spread = square - sums.q * sums.q;
  // With one level only (what remains is rounding) the min alone meets it.
  Lanes scale = (frame.total * sums.qy - sums.q * frame.y) * inverse(spread);
  scale = where_larger(spread, every(2e-6f) * square, scale, zero);
  Lanes offset = (frame.y - scale * sums.q) / frame.total;
  if constexpr (kNegativeMin) {
    const Lanes min = offset + frame.low;
    const Lanes alone = (sums.qy + frame.low * sums.q) * inverse(sums.qq);
    scale = where_larger(min, zero, alone, scale);
    offset = where_larger(min, zero, zero - frame.low, offset);
  }
  const Lanes linear = scale * sums.qy + offset * frame.y;
  const Lanes fitted = scale * scale * sums.qq + offset * offset * frame.total;
  const Lanes cross = scale * offset * sums.q;
  return {{scale, frame.low + offset}, linear + linear - fitted - cross - cross};
}

template <int kHighest, class R>
inline AffineSums affine_sums(const R& runs, const Lanes& low, const Lanes& zero_at,
                              const Lanes& per_scale) {
  AffineSums sums = {every(0.0f), every(0.0f), every(0.0f)};
  for (int e = 0; e < R::kElems; ++e) {
    const Lanes q = rounded(clamped((runs.x[e] - zero_at) * per_scale, 0, kHighest));
    const Lanes weighted = runs.weighted(e, q);
    sums.q = sums.q + weighted;
    sums.qq = sums.qq + q * weighted;
    sums.qy = sums.qy + (runs.x[e] - low) * weighted;
  }
  return sums;
}

template <int kHighest, bool kNegativeMin, Grid kGrid, class R>
inline Affine fit_affine(const R& runs, int n_refinements) {
  AffineFrame frame = {runs.x[0], runs.total, runs.weighted(0, runs.x[0])};
  Lanes high = runs.x[0];
  for (int e = 1; e < R::kElems; ++e) {
    frame.low = lesser(frame.low, runs.x[e]);
    high = larger(high, runs.x[e]);
    frame.y = frame.y + runs.weighted(e, runs.x[e]);
  }
  if constexpr (kNegativeMin) frame.low = lesser(frame.low, every(0.0f));
  frame.y = frame.y - frame.low * frame.total;
  const Lanes per_range = inverse(high - frame.low);
  AffineChoice best = {{every(0.0f), frame.low}, every(-1.0f)};
  for (int i = 0; i < kGrid.n; ++i) {
    const Lanes per_scale = every(kHighest + kGrid.stretch(i)) * per_range;
    best.keep_better(
        solve<kNegativeMin>(frame, affine_sums<kHighest>(runs, frame.low, frame.low, per_scale)),
        better_by<R>(kHighest + 1));
  }
  for (int i = 0; i < n_refinements; ++i) {
    const Lanes per_scale = inverse(best.found.scale);
    best.keep_better(solve<kNegativeMin>(
        frame, affine_sums<kHighest>(runs, frame.low, best.found.min, per_scale)));
  }
  return best.found;
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
