// Any machine with 128-bit vectors: SSE2 on x86-64, NEON on aarch64, through GCC vectors.
#pragma once

namespace mla::cpu::MLA_ISA {
namespace {
inline constexpr int kLanes = 4;
}  // namespace
}  // namespace mla::cpu::MLA_ISA
#include "backends/cpu/simd/lanes.h"

namespace mla::cpu::MLA_ISA {
namespace {

inline F32 load_f16(const uint16_t* p) {
  F32 v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
  return v;
}
inline void store_f16(uint16_t* p, F32 v) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
}
inline void store_bf16(uint16_t* p, F32 v) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(v[i]);
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
