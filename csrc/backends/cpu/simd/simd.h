// The vector types of the ISA this file is compiled for. The build defines exactly one of
// MLA_ISA_BASELINE, MLA_ISA_AVX2, MLA_ISA_AVX512VNNI, MLA_ISA_AVX512BF16, and MLA_ISA as the
// namespace name. Everything is in an anonymous namespace: no ISA's code may be linked for another.
//
// F32 (kLanes floats, a GCC vector: + - * / work on it; a * b + c contracts to one FMA):
//   load(const float*) store(float*, F32) set1(float) zero() load_f16(const uint16_t*)
//   load_bf16(const uint16_t*) store_f16 store_bf16 max(F32, F32) reduce_add reduce_max exp(F32)
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/half.h"

#if defined(MLA_ISA_AVX512BF16) || defined(MLA_ISA_AVX512VNNI)
#include "backends/cpu/simd/avx512.h"
#elif defined(MLA_ISA_AVX2)
#include "backends/cpu/simd/avx2.h"
#elif defined(MLA_ISA_BASELINE)
#include "backends/cpu/simd/generic.h"
#else
#error "the build must define the ISA"
#endif

#include "backends/cpu/simd/math.h"
