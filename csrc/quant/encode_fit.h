// Scales that make a group of numbers nearest to its levels: candidates around the widest range,
// each improved by least squares, the best kept.
#pragma once

namespace mla::fit {

// x ~ scale * q, q in [lowest, -lowest - 1]. The scale may be negative: the level `lowest` has no
// counterpart, so the largest magnitude of either sign takes it.
float symmetric(const float* x, int n, int lowest);

// x ~ scale * q + min, q in [0, highest].
struct Affine {
  float scale;
  float min;
};
// negative_min: min <= 0, as the super-blocks store it.
Affine affine(const float* x, int n, int highest, bool negative_min);

// x ~ scale * kIq4Levels[q].
float iq4_levels(const float* x, int n);

// The nearest q under a scale; 0 (or the level nearest to 0) where the scale is 0.
int nearest(float x, float scale, int lowest, int highest);
int nearest_level(float x, float scale);

}  // namespace mla::fit
