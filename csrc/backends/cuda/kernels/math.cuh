// Transcendental functions as the CPU computes them, operation by operation: where the host has
// fused multiply-add, results are the same to the bit, and so are the choices made by them.
// The polynomials and their error bounds: see backends/cpu/simd/math.h and kernels/row.inc.cpp.
#pragma once

#include "backends/cuda/kernels/intrinsics.cuh"

namespace mla::cuda {

// e^x within 2 ulp, subnormal results included.
__device__ inline float exp_exact(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -105.0f ? -105.0f : x;
  const float shifted = fmaf(x, 1.44269504f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  float r = fmaf(-n, 0.693359375f, x);
  r = fmaf(-n, -2.12194440e-4f, r);
  float p = 1.0f / 5040.0f;
  p = fmaf(p, r, 1.0f / 720.0f);
  p = fmaf(p, r, 1.0f / 120.0f);
  p = fmaf(p, r, 1.0f / 24.0f);
  p = fmaf(p, r, 1.0f / 6.0f);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  const int power = __float_as_int(shifted) - __float_as_int(12582912.0f);
  const int half = power >> 1;
  return p * __int_as_float((half + 127) << 23) * __int_as_float((power - half + 127) << 23);
}

__device__ inline float sigmoid_exact(float x) {
  const float e = exp_exact(x < 0.0f ? x : 0.0f - x);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

__device__ inline float silu_exact(float x) { return x * sigmoid_exact(x); }

// Cosine and sine of position * frequency, times scale; angles up to 2^31, exact to the rounding
// to float32. In double: the angle of a far position has no fraction left in float32.
struct Rotation {
  float cosine, sine;
};
__device__ inline Rotation rotation(int32_t position, float frequency, float scale) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const double angle = static_cast<double>(position) * static_cast<double>(frequency);
  const double shifted = fma(angle, 0x1.45f306dc9c883p-1, kMagic);  // 2/pi
  const double k = shifted - kMagic;
  double r = fma(-k, 0x1.921fb00000000p+0, angle);  // pi/2 in three parts
  r = fma(-k, 0x1.5110b00000000p-22, r);
  r = fma(-k, 0x1.18469898cc517p-44, r);
  const double r2 = r * r;
  double s = fma(r2, -2.505210838544172e-8, 2.7557319223985893e-6);
  s = fma(s, r2, -1.984126984126984e-4);
  s = fma(s, r2, 8.333333333333333e-3);
  s = fma(s, r2, -1.6666666666666666e-1);
  s = fma(s * r2, r, r);
  double c = fma(r2, 2.08767569878681e-9, -2.755731922398589e-7);
  c = fma(c, r2, 2.48015873015873e-5);
  c = fma(c, r2, -1.388888888888889e-3);
  c = fma(c, r2, 4.1666666666666664e-2);
  c = fma(c, r2, -0.5);
  c = fma(c, r2, 1.0);
  const long long quadrant = __double_as_longlong(shifted);
  const bool swap = (quadrant & 1) != 0;
  const double cosine = swap ? s : c;
  const double sine = swap ? c : s;
  return {scale * static_cast<float>(((quadrant + 1) & 2) != 0 ? -cosine : cosine),
          scale * static_cast<float>((quadrant & 2) != 0 ? -sine : sine)};
}

}  // namespace mla::cuda
