// Sixteen runs of numbers side by side: lane g of a register belongs to run g, so that encoders
// need no sums across lanes. Sixteen on every ISA, whatever the width of its registers.
#pragma once

#include "backends/cpu/kernels.h"
#include "backends/cpu/simd/simd.h"
#include "quant/blocks.h"

namespace mla::cpu::MLA_ISA {
namespace {

inline constexpr int kRuns = 16;

using Lanes = F32x16;

MLA_INLINE Lanes every(float x) {
  Lanes out;
  for (int i = 0; i < kSixteen; ++i) out.v[i] = set1(x);
  return out;
}
template <class Operation>
MLA_INLINE Lanes each(const Lanes& a, const Lanes& b, const Operation& operation) {
  Lanes out;
  for (int i = 0; i < kSixteen; ++i) out.v[i] = operation(a.v[i], b.v[i]);
  return out;
}
MLA_INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
  return each(a, b, [](F32 x, F32 y) { return x + y; });
}
MLA_INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
  return each(a, b, [](F32 x, F32 y) { return x - y; });
}
MLA_INLINE Lanes operator/(const Lanes& a, const Lanes& b) {
  return each(a, b, [](F32 x, F32 y) { return x / y; });
}
MLA_INLINE Lanes larger(const Lanes& a, const Lanes& b) {
  return each(a, b, [](F32 x, F32 y) { return x > y ? x : y; });
}
MLA_INLINE Lanes lesser(const Lanes& a, const Lanes& b) {
  return each(a, b, [](F32 x, F32 y) { return x < y ? x : y; });
}
MLA_INLINE Lanes clamped(const Lanes& x, float low, float high) {
  return lesser(larger(x, every(low)), every(high));
}
MLA_INLINE Lanes magnitude(const Lanes& x) { return larger(x, every(0.0f) - x); }
// a > b ? x : y
MLA_INLINE Lanes where_larger(const Lanes& a, const Lanes& b, const Lanes& x, const Lanes& y) {
  Lanes out;
  for (int i = 0; i < kSixteen; ++i) out.v[i] = a.v[i] > b.v[i] ? x.v[i] : y.v[i];
  return out;
}
// 1 / x, and 0 for 0.
MLA_INLINE Lanes inverse(const Lanes& x) {
  const Lanes one = every(1.0f);
  const Lanes zero = every(0.0f);
  const Lanes safe = where_larger(magnitude(x), zero, x, one);
  return where_larger(magnitude(x), zero, one / safe, zero);
}
// Nearest integer, ties to even, of |x| < 2^22: an addition that leaves no room for fractions.
MLA_INLINE Lanes rounded(const Lanes& x) {
  const Lanes magic = every(0x1.8p23f);
  return (x + magic) - magic;
}

// ---- rows <-> lanes -----------------------------------------------------------------------------
// Words of four rows -> words of four columns.
template <class Word4>
MLA_INLINE void transpose(Word4 (&t)[4]) {
  const Word4 low01 = __builtin_shufflevector(t[0], t[1], 0, 4, 1, 5);
  const Word4 high01 = __builtin_shufflevector(t[0], t[1], 2, 6, 3, 7);
  const Word4 low23 = __builtin_shufflevector(t[2], t[3], 0, 4, 1, 5);
  const Word4 high23 = __builtin_shufflevector(t[2], t[3], 2, 6, 3, 7);
  t[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  t[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  t[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  t[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}
typedef uint32_t U32x4 __attribute__((vector_size(16)));

// Element e of sixteen runs -> lane g of x[e].
template <int N>
MLA_INLINE void to_lanes(const float* const* run, Lanes* x) {
  std::byte* out = reinterpret_cast<std::byte*>(x);
  for (int e = 0; e < N; e += 4) {
    for (int g = 0; g < kRuns; g += 4) {
      U32x4 square[4];
      for (int i = 0; i < 4; ++i) square[i] = load_as<U32x4>(run[g + i] + e);
      transpose(square);
      for (int i = 0; i < 4; ++i) {
        std::memcpy(out + ((e + i) * kRuns + g) * sizeof(float), &square[i], sizeof(U32x4));
      }
    }
  }
}

// Whole numbers code(e) in [0, 255], or in [-128, 127] as two's complement, for elements e of
// sixteen runs -> one byte each, run after run. Four of a run are put into one word, so that only
// words need to be moved across lanes.
template <int N, class Code>
MLA_INLINE void to_runs(const Code& code, uint8_t* out) {
  constexpr int kWords = N / 4;
  I32 words[kWords][kSixteen];
  for (int w = 0; w < kWords; ++w) {
    for (int j = 0; j < 4; ++j) {
      const Lanes lanes = code(4 * w + j);
      for (int i = 0; i < kSixteen; ++i) {
        const I32 bits = (std::bit_cast<I32>(lanes.v[i] + set1(0x1.8p23f)) & 255) << (8 * j);
        words[w][i] = j == 0 ? bits : words[w][i] | bits;
      }
    }
  }
  const std::byte* from = reinterpret_cast<const std::byte*>(words);
  for (int w = 0; w < kWords; w += 4) {
    for (int g = 0; g < kRuns; g += 4) {
      U32x4 square[4];
      for (int i = 0; i < 4; ++i) square[i] = load_as<U32x4>(from + ((w + i) * kRuns + g) * 4);
      transpose(square);
      for (int i = 0; i < 4; ++i) std::memcpy(out + (g + i) * N + 4 * w, &square[i], 16);
    }
  }
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
