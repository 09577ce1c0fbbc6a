// Blocks out of sixteen runs: scales rounded as they are stored, then levels under those.
//
// Super-blocks choose the integers s and m of every run under the error that these really make,
// fit d and dmin to the result, and keep that if it is better once more.
#pragma once

#include "backends/cpu/kernels/encode_fit.inc.h"

namespace mla::cpu::MLA_ISA {
namespace {

// Lanes that belong to one block, kGroups of them, all get what `join` makes of them.
template <int kGroups, class Join>
MLA_INLINE Lanes over_block(const Lanes& a, const Join& join) {
  if constexpr (kGroups == 1) return a;
  float lane[kRuns];
  store_f32x16(lane, a);
  for (int first = 0; first < kRuns; first += kGroups) {
    float all = lane[first];
    for (int g = 1; g < kGroups; ++g) all = join(all, lane[first + g]);
    for (int g = 0; g < kGroups; ++g) lane[first + g] = all;
  }
  return load_f32x16(lane);
}
template <int kGroups>
MLA_INLINE Lanes block_max(const Lanes& a) {
  return over_block<kGroups>(a, [](float x, float y) { return x > y ? x : y; });
}
template <int kGroups>
MLA_INLINE Lanes block_sum(const Lanes& a) {
  return over_block<kGroups>(a, [](float x, float y) { return x + y; });
}

// Takes the power of two out of every block. False where an element is not finite.
template <int N, int kGroups, bool kWeighted>
inline bool normalize(Runs<N, kGroups, kWeighted>& runs) {
  Lanes widest = every(0.0f);
  for (int e = 0; e < N; ++e) widest = larger(widest, magnitude(runs.x[e]));
  widest = block_max<kGroups>(widest);
  for (int i = 0; i < kSixteen; ++i) {
    runs.up.v[i] = std::bit_cast<F32>(std::bit_cast<I32>(widest.v[i]) & 0x7f800000);
  }
  // Both limits have a normal inverse; what is smaller vanishes in binary16 anyway.
  runs.up = clamped(runs.up, 0x1p-100f, 0x1p126f);
  runs.down = every(1.0f) / runs.up;
  Lanes poison = every(0.0f);
  for (int e = 0; e < N; ++e) {
    runs.x[e] = runs.x[e] * runs.down;
    poison = poison + (runs.x[e] - runs.x[e]);
  }
  runs.total = every(static_cast<float>(N));
  if constexpr (kWeighted) {
    runs.total = every(0.0f);
    for (int e = 0; e < N; ++e) runs.total = runs.total + runs.importance[e];
  }
  float lane[kRuns];
  store_f32x16(lane, poison);
  bool finite = true;
  for (int g = 0; g < kRuns; ++g) finite &= lane[g] == 0;
  return finite;
}

// A scale as a block stores it, in the range of x: infinite where it exceeds binary16.
template <class R>
MLA_INLINE Lanes as_stored(const R& runs, const Lanes& scale) {
  Lanes value;
  for (int i = 0; i < kSixteen; ++i) {
    uint16_t bits[kLanes];
    store_f16(bits, scale.v[i] * runs.up.v[i]);
    value.v[i] = load_f16(bits) * runs.down.v[i];
  }
  return value;
}
// The bits of what as_stored gave. False where one is infinite.
template <class R>
MLA_INLINE bool store_bits(const R& runs, const Lanes& scale, uint16_t* bits) {
  bool finite = true;
  for (int i = 0; i < kSixteen; ++i) {
    store_f16(bits + i * kLanes, scale.v[i] * runs.up.v[i]);
  }
  for (int g = 0; g < kRuns; ++g) finite &= (bits[g] & 0x7c00) != 0x7c00;
  return finite;
}

// How often super-blocks fit d to the integers they chose, and choose again.
inline constexpr int kFits = 2;
// How many d are tried under importance.
inline constexpr int kScanned = 20;

// The d whose multiples in [low, high] come nearest to the scales found, each weighing what a
// distance costs: where few runs are all that matters, most multiples would miss them. The widest
// scale becomes the multiple `end`, or up to five less.
template <int kGroups>
inline Lanes scan(const Lanes& found, const Lanes& cost, const Lanes& widest, int low, int high) {
  const float end = static_cast<float>(low < 0 ? low - 1 : high + 1);
  const float step = low < 0 ? 0.25f : -0.25f;
  Lanes best = every(0.0f), least = every(__builtin_inff());
  for (int i = 0; i < kScanned; ++i) {
    const Lanes d = widest * every(1.0f / (end + step * static_cast<float>(i)));
    const Lanes s = rounded(clamped(found * inverse(d), low, high));
    const Lanes off = found - d * s;
    const Lanes error = block_sum<kGroups>(cost * off * off);
    best = where_larger(least, error, d, best);
    least = lesser(error, least);
  }
  return best;
}

// Sixteen encoded runs. s and m are set by super-blocks only, dmin by affine formats.
template <int N>
struct Coded {
  uint8_t q[kRuns * N];
  uint8_t s[kRuns], m[kRuns];
  uint16_t d[kRuns], dmin[kRuns];
};
MLA_INLINE void store_bytes(const Lanes& x, uint8_t* out) {
  float lane[kRuns];
  store_f32x16(lane, x);
  for (int g = 0; g < kRuns; ++g) out[g] = static_cast<uint8_t>(static_cast<int>(lane[g]));
}

// Least squares after the search. Weighted sums leave more to be found between candidates.
template <class R>
constexpr int refinements() {
  return R::kHasImportance ? 3 : 1;
}

// ---- symmetric formats; affine ones are in encode_affine.inc.h ----------------------------------
template <class Levels, class R>
inline void choose_levels(const R& runs, const Lanes& scale, uint8_t* out) {
  const Lanes per_scale = inverse(scale);
  to_runs<R::kElems>([&](int e) { return Levels::code(runs.x[e] * per_scale); }, out);
}

// x ~ d * level.
template <class Levels>
struct SmallSymmetric {
  static constexpr int kGroups = 1;
  static constexpr int kElems = block::kSmall;

  template <class R>
  static bool encode(const R& runs, Coded<kElems>& out) {
    const Lanes d = as_stored(runs, fit_scale<Levels>(runs, refinements<R>()).scale());
    choose_levels<Levels>(runs, d, out.q);
    return store_bits(runs, d, out.d);
  }
};

// x ~ d * s * level, s in [kLowest, -kLowest - 1] per run.
template <class Levels, int kGroups_, int kLowest>
struct SuperSymmetric {
  static constexpr int kGroups = kGroups_;
  static constexpr int kElems = block::kSuper / kGroups;

  struct Choice {
    Lanes s, error;  // the error less sum(x^2), which no choice changes
    ScaleSums sums;
  };

  template <class R>
  static Choice judge(const R& runs, const Lanes& d, const Lanes& s) {
    const Lanes scale = d * s;
    const ScaleSums sums = scale_sums<Levels>(runs, inverse(scale));
    return {s, scale * (scale * sums.ll - sums.xl - sums.xl), sums};
  }

  // Of the integers around s the one that makes the smallest error.
  template <class R>
  static Choice choose(const R& runs, const Lanes& d, const Lanes& s) {
    Choice best = judge(runs, d, s);
    for (float step : {-1.0f, 1.0f}) {
      const Choice other = judge(runs, d, clamped(s + every(step), kLowest, -kLowest - 1));
      const Lanes threshold = best.error;
      const auto keep = [&](Lanes& mine, const Lanes& theirs) {
        mine = where_larger(threshold, other.error, theirs, mine);
      };
      keep(best.s, other.s);
      keep(best.sums.xl, other.sums.xl);
      keep(best.sums.ll, other.sums.ll);
      keep(best.error, other.error);
    }
    return best;
  }

  // All choices of a block under one d.
  struct Trial {
    Lanes d;
    Choice choice;

    // Block by block.
    MLA_INLINE void keep_better(const Trial& other) {
      const Lanes before = block_sum<kGroups>(choice.error);
      const Lanes after = block_sum<kGroups>(other.choice.error);
      const auto keep = [&](Lanes& mine, const Lanes& theirs) {
        mine = where_larger(before, after, theirs, mine);
      };
      keep(d, other.d);
      keep(choice.s, other.choice.s);
      keep(choice.sums.xl, other.choice.sums.xl);
      keep(choice.sums.ll, other.choice.sums.ll);
      keep(choice.error, other.choice.error);
    }
  };

  template <class R>
  static Trial attempt(const R& runs, const Lanes& wanted, const Lanes& found) {
    const Lanes d = as_stored(runs, wanted);
    const Lanes nearest = rounded(clamped(found * inverse(d), kLowest, -kLowest - 1));
    return {d, choose(runs, d, nearest)};
  }

  template <class R>
  static bool encode(const R& runs, Coded<kElems>& out) {
    const ScaleSums fitted = fit_scale<Levels>(runs, 1);
    const Lanes found = fitted.scale();
    // The widest scale, of either sign, takes the lowest multiplier; or the one beside it, which
    // scales of the other sign reach too.
    const Lanes high = block_max<kGroups>(found);
    const Lanes low = block_max<kGroups>(every(0.0f) - found);
    const Lanes widest = where_larger(high, low, high, every(0.0f) - low);
    Trial best = attempt(runs, widest * every(1.0f / kLowest), found);
    best.keep_better(attempt(runs, widest * every(1.0f / (kLowest + 1)), found));
    if constexpr (R::kHasImportance) {
      best.keep_better(
          attempt(runs, scan<kGroups>(found, fitted.ll, widest, kLowest, -kLowest - 1), found));
    }
    for (int i = 0; i < kFits; ++i) {
      const Choice& c = best.choice;
      const Lanes xl = block_sum<kGroups>(c.s * c.sums.xl);
      const Lanes ll = block_sum<kGroups>(c.s * c.s * c.sums.ll);
      const Lanes d = as_stored(runs, xl * inverse(ll));
      best.keep_better({d, choose(runs, d, c.s)});
    }
    store_bytes(best.choice.s, out.s);
    choose_levels<Levels>(runs, best.d * best.choice.s, out.q);
    return store_bits(runs, best.d, out.d);
  }
};

}  // namespace
}  // namespace mla::cpu::MLA_ISA
