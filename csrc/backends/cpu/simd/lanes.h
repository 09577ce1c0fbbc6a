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

}  // namespace
}  // namespace mla::cpu::MLA_ISA
