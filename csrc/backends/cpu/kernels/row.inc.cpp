// The ops that work on one row of n float32 numbers, and conversions of rows.
//
//   to_f32     out[i] = x[i], x in any float format and element stride
//   from_f32   the reverse, contiguous, round to nearest even
//   add        a + b
//   rms_norm   x * weight / sqrt(mean(x^2) + eps), the mean in double
//   rotation   (cos, sin)(position * frequency) * scale, the angle in double
//   rope       (x0 c - x1 s, x0 s + x1 c) on the pairs (2i, 2i + 1)
//   softmax    e^(z - max z) / sum, z = scale * x + mask, the sum in double
//   swiglu     up * gate / (1 + e^-gate)
//   sigmoid    1 / (1 + e^-x)
//   add_squares  sums[i] + x[i]^2, in double
//   exp_sum    sum of e^(x - shift), the sum in double
//   encode_q8_0  blocks of 32: a half scale max|x| / 127, then 32 signed bytes
//
// Error against float64: a few ulp of each result (rope: of the pair's length; softmax: times
// 1 + |z|, as its argument is rounded to float32).
// Sums run over kSumLanes partial sums whatever the ISA's width, so that only the contraction of
// products tells two ISAs apart.
#include "backends/cpu/kernels.h"
#include "backends/cpu/simd/simd.h"

namespace mla::cpu::MLA_ISA {
namespace {

constexpr int kSumLanes = 16;  // the widest vector: never fewer lanes than a register has

// Calls body(i, count) for i = 0, kLanes, .. with count == kLanes but for the last.
template <class Body>
inline void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, std::integral_constant<int, kLanes>{});
  if (i < n) body(i, static_cast<int>(n - i));
}

inline F32 load_some(const float* p, std::integral_constant<int, kLanes>, float = 0) {
  return load(p);
}
inline F32 load_some(const float* p, int count, float fill = 0) {
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i < count ? p[i] : fill;
  return load(lane);
}
inline void store_some(float* p, std::integral_constant<int, kLanes>, F32 v) { store(p, v); }
inline void store_some(float* p, int count, F32 v) {
  float lane[kLanes];
  store(lane, v);
  for (int i = 0; i < count; ++i) p[i] = lane[i];
}

// ---- conversions --------------------------------------------------------------------------------
inline float element(const std::byte* p, Format format) {
  if (format == Format::F32) {
    float value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return format == Format::F16 ? half_to_float(bits) : bf16_to_float(bits);
}

template <F32 (*kLoad)(const uint16_t*)>
inline int64_t widen(const std::byte* x, int64_t n, float* out) {
  int64_t i = 0;
  const auto* p = reinterpret_cast<const uint16_t*>(x);
  for (; i + kLanes <= n; i += kLanes) store(out + i, kLoad(p + i));
  return i;
}

void to_f32(const std::byte* x, Format format, int64_t stride_bytes, int64_t n,
            float* out) noexcept {
  int64_t i = 0;
  if (format == Format::F32 && stride_bytes == 4) {
    if (n > 0) std::memcpy(out, x, static_cast<size_t>(n) * 4);
    return;
  }
  if (format == Format::F16 && stride_bytes == 2) i = widen<load_f16>(x, n, out);
  if (format == Format::BF16 && stride_bytes == 2) i = widen<load_bf16>(x, n, out);
  for (; i < n; ++i) out[i] = element(x + i * stride_bytes, format);
}

template <void (*kStore)(uint16_t*, F32)>
inline int64_t narrow(const float* x, int64_t n, std::byte* out) {
  int64_t i = 0;
  auto* p = reinterpret_cast<uint16_t*>(out);
  for (; i + kLanes <= n; i += kLanes) kStore(p + i, load(x + i));
  return i;
}

void from_f32(const float* x, int64_t n, Format format, std::byte* out) noexcept {
  if (format == Format::F32) {
    if (n > 0) std::memcpy(out, x, static_cast<size_t>(n) * 4);
    return;
  }
  const bool half = format == Format::F16;
  int64_t i = half ? narrow<store_f16>(x, n, out) : narrow<store_bf16>(x, n, out);
  for (; i < n; ++i) {
    const uint16_t bits = half ? float_to_half(x[i]) : float_to_bf16(x[i]);
    std::memcpy(out + 2 * i, &bits, sizeof bits);
  }
}

void encode_q8_0(const float* x, int64_t n, std::byte* out) noexcept {
  constexpr int kBlock = 32;
  for (int64_t b = 0; b < n / kBlock; ++b, x += kBlock, out += 2 + kBlock) {
    float largest = 0;
    float poison = 0;  // NaN has no code of 8 bits: its block's scale carries it
    for (int i = 0; i < kBlock; ++i) {
      const float magnitude = __builtin_fabsf(x[i]);
      largest = magnitude > largest ? magnitude : largest;
      poison += x[i] * 0.0f;
    }
    const float scale = largest / 127.0f + poison;
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    const uint16_t bits = float_to_half(scale);
    std::memcpy(out, &bits, sizeof bits);
    int8_t code[kBlock];
    for (int i = 0; i < kBlock; ++i) {  // 1.5 * 2^23: adding it rounds to an integer
      code[i] = static_cast<int8_t>(std::bit_cast<int32_t>(x[i] * inverse + 12582912.0f));
    }
    std::memcpy(out + 2, code, sizeof code);
  }
}

// ---- element by element -------------------------------------------------------------------------
void add(const float* a, const float* b, int64_t n, float* out) noexcept {
  for_lanes(n, [&](int64_t i, auto count) {
    store_some(out + i, count, load_some(a + i, count) + load_some(b + i, count));
  });
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) noexcept {
  for_lanes(n, [&](int64_t i, auto count) {
    store_some(out + i, count, silu(load_some(gate + i, count)) * load_some(up + i, count));
  });
}

void sigmoid_row(const float* x, int64_t n, float* out) noexcept {
  for_lanes(n, [&](int64_t i, auto count) {
    store_some(out + i, count, sigmoid(load_some(x + i, count)));
  });
}

// ---- rows with a sum ----------------------------------------------------------------------------
inline double sum_lanes(double* lane) {
  for (int n = kSumLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  }
  return lane[0];
}

inline double sum(const float* x, int64_t n) {
  double lane[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int l = 0; l < kSumLanes; ++l) lane[l] += static_cast<double>(x[i + l]);
  }
  for (int l = 0; i + l < n; ++l) lane[l] += static_cast<double>(x[i + l]);
  return sum_lanes(lane);
}

inline double sum_of_squares(const float* x, int64_t n) {
  double lane[kSumLanes] = {};  // a square of a float is exact in double: no overflow either
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int l = 0; l < kSumLanes; ++l) {
      const double value = x[i + l];
      lane[l] += value * value;
    }
  }
  for (int l = 0; i + l < n; ++l) {
    const double value = x[i + l];
    lane[l] += value * value;
  }
  return sum_lanes(lane);
}

void add_squares(const float* x, int64_t n, double* sums) noexcept {
  for (int64_t i = 0; i < n; ++i) {
    const double value = x[i];
    sums[i] += value * value;
  }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) noexcept {
  const double mean = sum_of_squares(x, n) / static_cast<double>(n);
  const double root = __builtin_sqrt(mean + static_cast<double>(eps));
  // A row of zeros with eps == 0 stays zeros; tiny rows keep their inverse in double.
  const double inverse = root > 0 ? 1.0 / root : root == 0 ? 0.0 : root;
  if (inverse > 1e30) {
    for (int64_t i = 0; i < n; ++i) {
      const float unit = static_cast<float>(static_cast<double>(x[i]) * inverse);
      out[i] = weight != nullptr ? unit * weight[i] : unit;
    }
    return;
  }
  const F32 factor = set1(static_cast<float>(inverse));
  for_lanes(n, [&](int64_t i, auto count) {
    const F32 unit = load_some(x + i, count) * factor;
    store_some(out + i, count, weight != nullptr ? unit * load_some(weight + i, count) : unit);
  });
}

void softmax(const float* x, const float* mask, float scale, int64_t n, float* out) noexcept {
  const float lowest = -__builtin_inff();
  const F32 factor = set1(scale);
  F32 best = set1(lowest);
  for_lanes(n, [&](int64_t i, auto count) {
    F32 z = load_some(x + i, count) * factor;
    if (mask != nullptr) z = z + load_some(mask + i, count);
    store_some(out + i, count, z);
    best = max(load_some(out + i, count, lowest), best);
  });
  const float largest = reduce_max(best);
  // Against 0 where all is -inf: then every exponential is 0, not NaN.
  const F32 shift = set1(largest == lowest ? 0.0f : largest);
  for_lanes(n, [&](int64_t i, auto count) {
    store_some(out + i, count, exp(load_some(out + i, count) - shift));
  });
  const double total = sum(out, n);
  const F32 inverse = set1(total == 0 ? 0.0f : static_cast<float>(1.0 / total));
  for_lanes(n, [&](int64_t i, auto count) {
    store_some(out + i, count, load_some(out + i, count) * inverse);
  });
}

double exp_sum(const float* x, float shift, int64_t n) noexcept {
  constexpr int64_t kPiece = 16 * kSumLanes;  // stays in the first-level cache
  const F32 offset = set1(shift);
  double total = 0;
  float piece[kPiece];
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t count = n - first < kPiece ? n - first : kPiece;
    for_lanes(count, [&](int64_t i, auto lanes) {
      store_some(piece + i, lanes, exp(load_some(x + first + i, lanes) - offset));
    });
    total += sum(piece, count);
  }
  return total;
}

// ---- rotary positions ---------------------------------------------------------------------------
// cos and sin of an angle up to 2^31: k = round(angle / (pi/2)) has at most 31 bits, so its
// products with the first two parts of pi/2 (22 bits each) are exact, and so are the differences.
void rotation(int32_t position, const float* frequencies, float scale, int64_t n, float* cosine,
              float* sine) noexcept {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  for (int64_t i = 0; i < n; ++i) {
    const double angle = static_cast<double>(position) * static_cast<double>(frequencies[i]);
    const double shifted = angle * 0x1.45f306dc9c883p-1 + kMagic;  // 2/pi
    const double k = shifted - kMagic;
    double r = angle - k * 0x1.921fb00000000p+0;
    r -= k * 0x1.5110b00000000p-22;
    r -= k * 0x1.18469898cc517p-44;
    const double r2 = r * r;
    // Taylor: on |r| <= pi/4 the first missing terms are below 2^-37.
    double s = r2 * -2.505210838544172e-8 + 2.7557319223985893e-6;
    s = s * r2 - 1.984126984126984e-4;
    s = s * r2 + 8.333333333333333e-3;
    s = s * r2 - 1.6666666666666666e-1;
    s = s * r2 * r + r;
    double c = r2 * 2.08767569878681e-9 - 2.755731922398589e-7;
    c = c * r2 + 2.48015873015873e-5;
    c = c * r2 - 1.388888888888889e-3;
    c = c * r2 + 4.1666666666666664e-2;
    c = c * r2 - 0.5;
    c = c * r2 + 1.0;
    const int64_t quadrant = std::bit_cast<int64_t>(shifted);
    const bool swap = (quadrant & 1) != 0;
    const double cos_value = swap ? s : c;
    const double sin_value = swap ? c : s;
    cosine[i] = scale * static_cast<float>(((quadrant + 1) & 2) != 0 ? -cos_value : cos_value);
    sine[i] = scale * static_cast<float>((quadrant & 2) != 0 ? -sin_value : sin_value);
  }
}

void rope(const float* x, const float* cosine, const float* sine, int64_t n, float* out) noexcept {
  for (int64_t i = 0; i < n / 2; ++i) {
    const float even = x[2 * i];
    const float odd = x[2 * i + 1];
    out[2 * i] = even * cosine[i] - odd * sine[i];
    out[2 * i + 1] = even * sine[i] + odd * cosine[i];
  }
}

}  // namespace

extern const RowTable row_table;
const RowTable row_table = {to_f32,  from_f32, add,         rms_norm,    rotation,    rope,
                            softmax, swiglu,   sigmoid_row, encode_q8_0, add_squares, exp_sum};

}  // namespace mla::cpu::MLA_ISA
