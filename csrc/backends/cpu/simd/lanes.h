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

inline float reduce_add(F32 v) {  // pairwise, the same tree at every width
  float lane[kLanes];
  store(lane, v);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  }
  return lane[0];
}
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
// Quantized weights are unpacked in groups of 32 bytes, whatever the width of a register: the
// compiler splits U8x32 where registers are narrower.
typedef uint8_t Bytes __attribute__((vector_size(kLanes * 4)));  // one register
typedef uint8_t U8x16 __attribute__((vector_size(16)));
typedef uint8_t U8x32 __attribute__((vector_size(32)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));

struct F32x16 {  // one number for each of the 16 groups of 16 in 256 elements
  F32 v[16 / kLanes];
};
inline constexpr int kSixteen = 16 / kLanes;  // registers that hold 16 floats

// One word of each of kLanes rows, row r in lane r.
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
struct Words {  // four neighbouring ones
  U32 w[4];
};

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline U8x32 splat(uint8_t x) { return x - U8x32{}; }
// Shifts of all bits; the caller masks off what crosses from a neighbouring byte.
inline U8x32 shift_right(U8x32 v, int n) { return (U8x32)((U16x16)v >> n); }
inline U8x32 shift_left(U8x32 v, int n) { return (U8x32)((U16x16)v << n); }

inline F32x16 load_f32x16(const float* p) {
  F32x16 out;
  for (int i = 0; i < kSixteen; ++i) out.v[i] = load(p + i * kLanes);
  return out;
}
inline void store_f32x16(float* p, const F32x16& x) {
  for (int i = 0; i < kSixteen; ++i) store(p + i * kLanes, x.v[i]);
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
