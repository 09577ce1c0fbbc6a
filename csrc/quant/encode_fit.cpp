#include "quant/encode_fit.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "quant/blocks.h"

namespace mla::fit {
namespace {

// How far the range is stretched and shrunk around the extreme value's, in tenths of a level: a
// shrunk range clips the extremes and resolves the rest better. Beyond one level nothing is gained.
constexpr int kCandidates = 10;
constexpr float kStep = 0.1f;

float extreme(const float* x, int n) {
  float found = 0;
  for (int i = 0; i < n; ++i) {
    if (std::fabs(x[i]) > std::fabs(found)) found = x[i];
  }
  return found;
}

// Keeps the scale sum(xl) / sum(ll) that explains most of the sum of squares, sum(xl)^2 / sum(ll).
struct BestScale {
  float scale = 0;
  float gain = 0;
  void offer(float sum_xl, float sum_ll) {
    if (sum_ll > 0 && sum_xl * sum_xl > gain * sum_ll) {
      gain = sum_xl * sum_xl / sum_ll;
      scale = sum_xl / sum_ll;
    }
  }
};

// Midway between two levels the next one begins, and twice every midpoint is an integer: so the
// index of the nearest level depends on the ceiling of twice the value only.
constexpr int kTwiceWidest = 255;
struct LevelTable {
  uint8_t index[2 * kTwiceWidest + 1];
  constexpr LevelTable() : index() {
    for (int twice = -kTwiceWidest; twice <= kTwiceWidest; ++twice) {
      uint8_t q = 0;
      while (q < 15 && twice > block::kIq4Levels[q] + block::kIq4Levels[q + 1]) ++q;
      index[twice + kTwiceWidest] = q;
    }
  }
};
constexpr LevelTable kNearestLevel;

// Nearest integer, ties to even, of |x| < 2^22: an addition that leaves no room for fractions.
// Unlike lrintf() it compiles to two instructions, of which vectors have theirs too.
float round_small(float x) {
  constexpr float kNoFraction = 0x1.8p23f;
  return (x + kNoFraction) - kNoFraction;
}

float clamped(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

float nearest_float(float x, float inverse, float low, float high) {
  return round_small(clamped(x * inverse, low, high));
}

struct AffineSums {
  float x = 0, q = 0, qq = 0, qx = 0;
};

Affine solve(const AffineSums& sums, int n, bool negative_min) {
  const float count = static_cast<float>(n);
  const float det = count * sums.qq - sums.q * sums.q;
  // With one level only, the min alone meets it.
  const Affine found = det > 0 ? Affine{(count * sums.qx - sums.q * sums.x) / det,
                                        (sums.qq * sums.x - sums.q * sums.qx) / det}
                               : Affine{0, sums.x / count};
  return negative_min && found.min > 0 ? Affine{sums.qx / sums.qq, 0} : found;
}

float squared_error(const float* x, int n, const Affine& a, int highest) {
  const float inverse = a.scale == 0 ? 0 : 1 / a.scale;
  float error = 0;
  for (int i = 0; i < n; ++i) {
    const float q = nearest_float(x[i] - a.min, inverse, 0, static_cast<float>(highest));
    const float off = x[i] - a.min - a.scale * q;
    error += off * off;
  }
  return error;
}

}  // namespace

int nearest(float x, float scale, int lowest, int highest) {
  if (scale == 0) return std::clamp(0, lowest, highest);
  // Clamped as a float: a tiny scale makes quotients that no integer holds.
  const float q = std::clamp(x / scale, static_cast<float>(lowest), static_cast<float>(highest));
  return static_cast<int>(std::lrintf(q));
}

int nearest_level(float x, float scale) {
  const float twice = scale == 0 ? 0 : 2 * x / scale;
  const float up = std::ceil(clamped(twice, -kTwiceWidest, kTwiceWidest));
  return kNearestLevel.index[static_cast<int>(up) + kTwiceWidest];
}

float symmetric(const float* x, int n, int lowest) {
  const float widest = extreme(x, n);
  BestScale best;
  for (int t = -kCandidates; widest != 0 && t <= kCandidates; ++t) {
    const float inverse = (static_cast<float>(lowest) + kStep * static_cast<float>(t)) / widest;
    float sum_xl = 0;
    float sum_ll = 0;
    for (int i = 0; i < n; ++i) {
      const float q =
          nearest_float(x[i], inverse, static_cast<float>(lowest), static_cast<float>(-lowest - 1));
      sum_xl += x[i] * q;
      sum_ll += q * q;
    }
    best.offer(sum_xl, sum_ll);
  }
  return best.scale;
}

Affine affine(const float* x, int n, int highest, bool negative_min) {
  auto [low, high] = std::minmax_element(x, x + n);
  const float min = negative_min ? std::min(*low, 0.0f) : *low;
  const float range = *high - min;
  Affine best = {0, min};
  float least = std::numeric_limits<float>::infinity();
  for (int t = -kCandidates; range > 0 && t <= kCandidates; ++t) {
    // A range below zero levels would turn the formats of two bits around.
    const float n_levels = static_cast<float>(highest) + kStep * static_cast<float>(t);
    const float inverse = n_levels / range;
    AffineSums sums;
    for (int i = 0; i < n; ++i) {
      const float q = nearest_float(x[i] - min, inverse, 0, static_cast<float>(highest));
      sums.x += x[i];
      sums.q += q;
      sums.qq += q * q;
      sums.qx += q * x[i];
    }
    const Affine found = solve(sums, n, negative_min);
    const float error = squared_error(x, n, found, highest);
    if (error < least) {
      least = error;
      best = found;
    }
  }
  return best;
}

float iq4_levels(const float* x, int n) {
  const float widest = extreme(x, n);
  BestScale best;
  for (int side : {0, 15}) {  // the extreme meets the lowest or the highest level
    for (int t = -kCandidates; widest != 0 && t <= kCandidates; ++t) {
      const float scale =
          widest / (static_cast<float>(block::kIq4Levels[side]) + static_cast<float>(t));
      float sum_xl = 0;
      float sum_ll = 0;
      for (int i = 0; i < n; ++i) {
        const float level = static_cast<float>(block::kIq4Levels[nearest_level(x[i], scale)]);
        sum_xl += x[i] * level;
        sum_ll += level * level;
      }
      best.offer(sum_xl, sum_ll);
    }
  }
  return best.scale;
}

}  // namespace mla::fit
