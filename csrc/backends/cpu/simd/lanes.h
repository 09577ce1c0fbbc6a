// The operations every width shares, on GCC vectors; included by each ISA's file after it has set
// kLanes.
#pragma once

namespace mla::cpu::MLA_ISA {
namespace {

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));

inline F32 load(const float* p) {
  F32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F32 v) { std::memcpy(p, &v, sizeof v); }
inline F32 set1(float x) { return x - F32{}; }
inline F32 zero() { return F32{}; }
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }

// Halves are added until one number is left: the same tree at every width.
template <int n>
struct Halves {
  typedef float V __attribute__((vector_size(n * sizeof(float))));
  static float add(V v) {
    typename Halves<n / 2>::V half[2];
    std::memcpy(half, &v, sizeof v);
    return Halves<n / 2>::add(half[0] + half[1]);
  }
};
template <>
struct Halves<1> {
  using V = float;
  static float add(float v) { return v; }
};
inline float reduce_add(F32 v) { return Halves<kLanes>::add(v); }
inline float reduce_max(F32 v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

inline F32 load_bf16(const uint16_t* p) {
  typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));
  typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
  U16 v;
  std::memcpy(&v, p, sizeof v);
  return std::bit_cast<F32>(__builtin_convertvector(v, U32) << 16);
}

inline F32 to_f32(I32 v) { return __builtin_convertvector(v, F32); }

// ---- small integers -----------------------------------------------------------------------------
typedef uint8_t Bytes __attribute__((vector_size(kLanes * 4)));  // one register
typedef uint8_t U8x16 __attribute__((vector_size(16)));

struct F32x16 {  // one number for each of the 16 groups of 16 in 256 elements
  F32 v[16 / kLanes];
};
inline constexpr int kSixteen = 16 / kLanes;  // registers that hold 16 floats

// One word of each of kLanes rows, row r in lane r.
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
struct Words {  // four neighbouring ones
  U32 w[4];
};

// One number for each of the 8 groups of 32; half a register where those are wider.
inline constexpr int kEight = kLanes < 8 ? 8 / kLanes : 1;
typedef float Eighth __attribute__((vector_size(32 / kEight)));
struct F32x8 {
  Eighth v[kEight];
};

// 256 bytes are kParts registers of kUnits units of 16 bytes, each half a group of 32 elements, in
// one of two orders. Unit u of part i is half half(i, u) of group group(i, u). `Paired`: the two
// halves of a group are in the same unit of parts 2 j and 2 j + 1, so that what shares a scale is
// summed before it is scaled. `Whole`: they are neighbours.
inline constexpr int kUnits = kLanes / 4;
inline constexpr int kParts = 16 / kUnits;

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline F32x16 load_f32x16(const float* p) {
  F32x16 out;
  for (int i = 0; i < kSixteen; ++i) out.v[i] = load(p + i * kLanes);
  return out;
}
inline void store_f32x16(float* p, const F32x16& x) {
  for (int i = 0; i < kSixteen; ++i) store(p + i * kLanes, x.v[i]);
}
inline F32x8 load_f32x8(const float* p) { return load_as<F32x8>(p); }
inline F32x8 operator*(const F32x8& a, const F32x8& b) {
  F32x8 out;
  for (int i = 0; i < kEight; ++i) out.v[i] = a.v[i] * b.v[i];
  return out;
}
inline F32x8 operator*(float a, const F32x8& b) {
  F32x8 out;
  for (int i = 0; i < kEight; ++i) out.v[i] = (a - Eighth{}) * b.v[i];
  return out;
}
inline F32x16 operator*(const F32x16& a, const F32x16& b) {
  F32x16 out;
  for (int i = 0; i < kSixteen; ++i) out.v[i] = a.v[i] * b.v[i];
  return out;
}
inline F32x16 operator*(float a, const F32x16& b) {
  F32x16 out;
  for (int i = 0; i < kSixteen; ++i) out.v[i] = set1(a) * b.v[i];
  return out;
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
