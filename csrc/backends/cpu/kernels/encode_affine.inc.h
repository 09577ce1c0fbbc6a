// Blocks of affine formats: x ~ d * q + m, or x ~ d * s * q - dmin * m with s and m per run.
#pragma once

#include "backends/cpu/kernels/encode_blocks.inc.h"

namespace mla::cpu::MLA_ISA {
namespace {

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

  // All choices of a block under one unit.
  struct Trial {
    Unit unit;
    Choice choice;

    // Block by block.
    MLA_INLINE void keep_better(const Trial& other) {
      const Lanes before = block_sum<kGroups>(choice.error);
      const Lanes after = block_sum<kGroups>(other.choice.error);
      const auto keep = [&](Lanes& mine, const Lanes& theirs) {
        mine = where_larger(before, after, theirs, mine);
      };
      keep(unit.d, other.unit.d);
      keep(unit.dmin, other.unit.dmin);
      keep(choice.s, other.choice.s);
      keep(choice.m, other.choice.m);
      keep(choice.error, other.choice.error);
      keep(choice.sums.q, other.choice.sums.q);
      keep(choice.sums.qq, other.choice.sums.qq);
      keep(choice.sums.xq, other.choice.sums.xq);
    }
  };

  template <class R>
  static Trial attempt(const R& runs, const Unit& wanted, const Lanes& scale, const Lanes& depth) {
    const Unit unit = {as_stored(runs, wanted.d), as_stored(runs, wanted.dmin)};
    const Lanes s = rounded(clamped(scale * inverse(unit.d), 0, kMost));
    const Lanes m = rounded(clamped(depth * inverse(unit.dmin), 0, kMost));
    return {unit, choose(runs, unit, s, m)};
  }

  template <class R>
  static bool encode(const R& runs, Coded<kElems>& out) {
    constexpr Grid kGrid = R::kHasImportance ? kImportant : kPlain;
    const Affine found = fit_affine<kHighest, true, kGrid>(runs, 1);
    const Lanes depth = every(0.0f) - found.min;
    const Lanes widest = block_max<kGroups>(found.scale);
    const Lanes deepest = block_max<kGroups>(depth);
    const Lanes part = every(1.0f / kMost);
    Trial trial = attempt(runs, {widest * part, deepest * part}, found.scale, depth);
    if constexpr (R::kHasImportance && kMost < kScanned) {  // more multiples miss nothing
      const Unit scanned = {scan<kGroups>(found.scale, runs.total, widest, 0, kMost),
                            scan<kGroups>(depth, runs.total, deepest, 0, kMost)};
      trial.keep_better(attempt(runs, scanned, found.scale, depth));
    }
    for (int i = 0; i < kFits; ++i) {
      const Unit fitted = fit_unit(runs, trial.choice, trial.unit);
      trial.keep_better({fitted, choose(runs, fitted, trial.choice.s, trial.choice.m)});
    }
    const Choice& best = trial.choice;
    const Unit& unit = trial.unit;
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
