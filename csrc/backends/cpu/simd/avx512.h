// AVX-512 F, BW, VL, DQ and VNNI; with BF16 where MLA_ISA_AVX512BF16 is set.
#pragma once

#include <immintrin.h>

namespace mla::cpu::MLA_ISA {
namespace {
inline constexpr int kLanes = 16;
}  // namespace
}  // namespace mla::cpu::MLA_ISA
#include "backends/cpu/simd/lanes.h"

namespace mla::cpu::MLA_ISA {
namespace {

inline F32 load_f16(const uint16_t* p) {
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, F32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_bf16(uint16_t* p, F32 v) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(v[i]);
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
