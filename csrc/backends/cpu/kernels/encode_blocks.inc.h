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
template <int kGroups, int N, bool kWeighted>
inline bool normalize(Runs<N, kWeighted>& runs) {
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

// ---- symmetric ----------------------------------------------------------------------------------
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

  // The d whose multiples come nearest to the scales found, each weighing what a distance costs:
  // where few runs are all that matters, most multiples would miss them.
  static Lanes scan(const Lanes& found, const Lanes& cost, const Lanes& widest) {
    Lanes best = every(0.0f), least = every(__builtin_inff());
    for (int i = 0; i < kScanned; ++i) {
      const float lowest = static_cast<float>(kLowest) - 1 + 0.25f * static_cast<float>(i);
      const Lanes d = widest * every(1.0f / lowest);
      const Lanes s = rounded(clamped(found * inverse(d), kLowest, -kLowest - 1));
      const Lanes off = found - d * s;
      const Lanes error = block_sum<kGroups>(cost * off * off);
      best = where_larger(least, error, d, best);
      least = lesser(error, least);
    }
    return best;
  }

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
      best.keep_better(attempt(runs, scan(found, fitted.ll, widest), found));
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

// ---- affine -------------------------------------------------------------------------------------
template <int kHighest, class R>
inline void choose_affine(const R& runs, const Affine& under, uint8_t* out) {
  const Lanes per_scale = inverse(under.scale);
  const auto code = [&](int e) {
    return rounded(clamped((runs.x[e] - under.min) * per_scale, 0, kHighest));
  };
  to_runs<R::kElems>(code, out);
}

// x ~ d * q + m; m is stored as Coded::dmin.
template <int kHighest, Grid kPlain, Grid kImportant>
struct SmallAffine {
  static constexpr int kGroups = 1;
  static constexpr int kElems = block::kSmall;

  // What suits the rounded scale best, where it is so small that rounding moved it far.
  template <class R>
  static Lanes min_under(const R& runs, const Affine& stored) {
    const Lanes per_scale = inverse(stored.scale);
    const AffineSums sums = affine_sums<kHighest>(runs, every(0.0f), stored.min, per_scale);
    Lanes x = every(0.0f);
    for (int e = 0; e < kElems; ++e) x = x + runs.weighted(e, runs.x[e]);
    return (x - stored.scale * sums.q) / runs.total;
  }

  template <class R>
  static bool encode(const R& runs, Coded<kElems>& out) {
    constexpr Grid kGrid = R::kHasImportance ? kImportant : kPlain;
    const Affine found = fit_affine<kHighest, false, kGrid>(runs, refinements<R>());
    Affine stored = {as_stored(runs, found.scale), as_stored(runs, found.min)};
    if constexpr (R::kHasImportance) stored.min = as_stored(runs, min_under(runs, stored));
    choose_affine<kHighest>(runs, stored, out.q);
    const bool has_d = store_bits(runs, stored.scale, out.d);
    return store_bits(runs, stored.min, out.dmin) && has_d;
  }
};

// x ~ d * s * q - dmin * m, s and m in [0, kMost] per run.
template <int kGroups_, int kHighest, int kMost, Grid kPlain, Grid kImportant>
struct SuperAffine {
  static constexpr int kGroups = kGroups_;
  static constexpr int kElems = block::kSuper / kGroups;

  struct Sums {
    Lanes q, qq, xq, x;
  };
  struct Choice {
    Lanes s, m, error;  // the error less sum(x^2), which no choice changes
    Sums sums;
  };
  struct Unit {
    Lanes d, dmin;
  };

  template <class R>
  static Sums sums_under(const R& runs, const Lanes& scale, const Lanes& offset) {
    const Lanes per_scale = inverse(scale);
    const Lanes zero = every(0.0f);
    Sums sums = {zero, zero, zero, zero};
    for (int e = 0; e < kElems; ++e) {
      const Lanes q = rounded(clamped((runs.x[e] + offset) * per_scale, 0, kHighest));
      const Lanes weighted = runs.weighted(e, q);
      sums.q = sums.q + weighted;
      sums.qq = sums.qq + q * weighted;
      sums.xq = sums.xq + runs.x[e] * weighted;
      sums.x = sums.x + runs.weighted(e, runs.x[e]);
    }
    return sums;
  }

  static Lanes error_of(const Lanes& total, const Lanes& scale, const Lanes& offset,
                        const Sums& sums) {
    const Lanes fitted = scale * scale * sums.qq + offset * offset * total;
    const Lanes cross = scale * sums.xq - offset * sums.x + scale * offset * sums.q;
    return fitted - cross - cross;
  }

  // s as given, and the m that suits the q it gives best.
  template <class R>
  static Choice judge(const R& runs, const Unit& unit, const Lanes& s, const Lanes& m) {
    const Lanes scale = unit.d * s;
    const Sums first = sums_under(runs, scale, unit.dmin * m);
    const Lanes wanted = (scale * first.q - first.x) * inverse(runs.total * unit.dmin);
    const Lanes suited = rounded(clamped(wanted, 0, kMost));
    const Lanes offset = unit.dmin * suited;
    const Sums sums = sums_under(runs, scale, offset);
    return {s, suited, error_of(runs.total, scale, offset, sums), sums};
  }

  template <class R>
  static Choice choose(const R& runs, const Unit& unit, const Lanes& s, const Lanes& m) {
    Choice best = judge(runs, unit, s, m);
    for (float step : {-1.0f, 1.0f}) {
      const Choice other = judge(runs, unit, clamped(s + every(step), 0, kMost), m);
      const Lanes threshold = best.error;
      const auto keep = [&](Lanes& mine, const Lanes& theirs) {
        mine = where_larger(threshold, other.error, theirs, mine);
      };
      keep(best.s, other.s);
      keep(best.m, other.m);
      keep(best.sums.q, other.sums.q);
      keep(best.sums.qq, other.sums.qq);
      keep(best.sums.xq, other.sums.xq);
      keep(best.error, other.error);
    }
    return best;
  }

  // d and dmin by least squares over the block, for its s, m and q.
  template <class R>
  static Unit fit_unit(const R& runs, const Choice& c, const Unit& old) {
    const Lanes aa = block_sum<kGroups>(c.s * c.s * c.sums.qq);
    const Lanes ab = block_sum<kGroups>(c.s * c.m * c.sums.q);
    const Lanes bb = block_sum<kGroups>(c.m * c.m * runs.total);
    const Lanes xa = block_sum<kGroups>(c.s * c.sums.xq);
    const Lanes xb = block_sum<kGroups>(c.m * c.sums.x);
    const Lanes square = aa * bb;
    const Lanes det = square - ab * ab;
    const Lanes per_det = inverse(det);
    const Lanes limit = every(1e-4f) * square;
    const Lanes d = where_larger(det, limit, (xa * bb - xb * ab) * per_det, old.d);
    const Lanes dmin = where_larger(det, limit, (xa * ab - xb * aa) * per_det, old.dmin);
    return {as_stored(runs, larger(d, every(0.0f))), as_stored(runs, larger(dmin, every(0.0f)))};
  }

  template <class R>
  static bool encode(const R& runs, Coded<kElems>& out) {
    constexpr Grid kGrid = R::kHasImportance ? kImportant : kPlain;
    const Affine found = fit_affine<kHighest, true, kGrid>(runs, 1);
    const Lanes widest = block_max<kGroups>(found.scale);
    const Lanes deepest = block_max<kGroups>(every(0.0f) - found.min);
    Unit unit = {as_stored(runs, widest * every(1.0f / kMost)),
                 as_stored(runs, deepest * every(1.0f / kMost))};
    const Lanes s = rounded(clamped(found.scale * inverse(unit.d), 0, kMost));
    const Lanes m = rounded(clamped((every(0.0f) - found.min) * inverse(unit.dmin), 0, kMost));
    Choice best = choose(runs, unit, s, m);
    for (int i = 0; i < kFits; ++i) {
      const Unit fitted = fit_unit(runs, best, unit);
      const Choice again = choose(runs, fitted, best.s, best.m);
      const Lanes before = block_sum<kGroups>(best.error);
      const Lanes after = block_sum<kGroups>(again.error);
      const auto keep = [&](Lanes& mine, const Lanes& theirs) {
        mine = where_larger(before, after, theirs, mine);
      };
      keep(unit.d, fitted.d);
      keep(unit.dmin, fitted.dmin);
      keep(best.s, again.s);
      keep(best.m, again.m);
      keep(best.error, again.error);
      keep(best.sums.q, again.sums.q);
      keep(best.sums.qq, again.sums.qq);
      keep(best.sums.xq, again.sums.xq);
    }
    store_bytes(best.s, out.s);
    store_bytes(best.m, out.m);
    const Lanes min = every(0.0f) - unit.dmin * best.m;
    choose_affine<kHighest>(runs, {unit.d * best.s, min}, out.q);
    const bool has_d = store_bits(runs, unit.d, out.d);
    return store_bits(runs, unit.dmin, out.dmin) && has_d;
  }
};

}  // namespace
}  // namespace mla::cpu::MLA_ISA
