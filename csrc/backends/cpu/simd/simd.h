// The vector types of the ISA this file is compiled for. The build defines exactly one of
// MLA_ISA_BASELINE, MLA_ISA_AVX2, MLA_ISA_AVX512VNNI, MLA_ISA_AVX512BF16, and MLA_ISA as the
// namespace name. Everything is in an anonymous namespace: no ISA's code may be linked for another.
//
// F32 (kLanes floats, a GCC vector: + - * / work on it; a * b + c contracts to one FMA):
//   load(const float*) store(float*, F32) set1(float) zero() load_f16(const uint16_t*)
//   load_bf16(const uint16_t*) store_f16 store_bf16 max(F32, F32) reduce_add reduce_max exp(F32)
//
// Small integers (Bytes: one register of them; 256 weights are kParts registers):
//   I32 dot<is_signed>(Bytes w, Bytes x)  products of w with x in [-127, 127], summed in fours; a
//       lane's four lie within the 16 bytes that `spread` gives one scale. w in [0, 127], or in
//       [-128, 127] if is_signed. Where kSignedByOffset, w may be any unsigned byte, and signed
//       weights come as w + 128: the kernel takes 128 sum(x) off again.
//   I32 dot_add(sum, w, x)  sum + dot<false>(w, x)
//   put_pair(Bytes*, pair, U8x32, U8x32)  groups 2 pair and 2 pair + 1 of 32 bytes, into registers
//   F32 spread(F32x16, part)          one number per 16 bytes -> the lanes of register `part`
//   F32x16 widen_u8, widen_s8(U8x16), widen_f16(U16x16)
//   U8x32 concat(U8x16 low, U8x16 high)
//   U8x32 lookup16(table of 16, index), bits_to_bytes(bits, value): value where the bit is set
//   Words words_of_rows(p, stride)    16 bytes of each of kLanes rows, turned round: word i of row
//                                     r in lane r of w[i]
//   F32 f16_low(U32)                  of the half in each lane's low 16 bits
//   Bytes lookup_bytes(table of 16, index)
//   FourSums, begin_fours(I32), add_fours<is_signed>(FourSums, w, x), end_fours(I32, FourSums)
//       a lane's four bytes of w with those of x, added to a lane of I32; w and x as in `dot`.
//       kSumsPairs: on the way 16 bits hold the sums of pairs, which must not overflow.
// Only if kHasBf16Dot, where a lane of I32 holds a pair of bf16, the first in its low half:
//   F32 dot_bf16(acc, w, x)           2 kLanes bf16 products
//   F32 dot_pairs(acc, I32 w, I32 x)  the same in registers: a lane adds its two products
//   I32 join_pairs(low, high)         2 kLanes floats, rounded, in their order
//   I32 zip_pairs(even, odd)          lane l: even[l] and odd[l], rounded
//   zip_words(even, odd, &low, &high) 2 kLanes words each: word i of both becomes pair i
//   F32 exp2_near(x)                  2^x within 3e-6 of it, exact at 0; 0 at -inf, NaN stays NaN
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/half.h"

// For what works on registers: a call would pass them through memory.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MLA_INLINE inline  // instrumented code grows too large otherwise
#else
#define MLA_INLINE inline __attribute__((always_inline))
#endif

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
