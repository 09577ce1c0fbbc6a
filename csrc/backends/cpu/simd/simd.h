// The vector types of the ISA this file is compiled for. The build defines exactly one of
// MLA_ISA_BASELINE, MLA_ISA_AVX2, MLA_ISA_AVX512VNNI, MLA_ISA_AVX512BF16 (and with it perhaps
// MLA_ISA_AVX512AMX, see amx.h), and MLA_ISA as the namespace name. Everything is in an anonymous
// namespace: no ISA's code may be linked for another.
//
// F32 (kLanes floats, a GCC vector: + - * / work on it; a * b + c contracts to one FMA):
//   load(const float*) store(float*, F32) set1(float) zero() load_f16(const uint16_t*)
//   load_bf16(const uint16_t*) store_f16 store_bf16 max(F32, F32) reduce_add reduce_max exp(F32)
//
// Small integers (Bytes: one register of them; 256 weights are kParts registers, see lanes.h):
//   I32 dot<is_signed>(Bytes w, Bytes x)  products of w with x in [-127, 127], summed in fours; a
//       lane's four lie within one unit of 16 bytes. w in [0, 127], or in [-128, 127] if is_signed.
//       Where kSignedByOffset, w may be any unsigned byte, and signed weights come as w + 128: the
//       kernel takes 128 sum(x) off again.
//   I32 dot_add(sum, w, x)  sum + dot<false>(w, x)
//   I32 dot_pair<is_signed>(w0, x0, w1, x1)  dot(w0, x0) + dot(w1, x1), w at most 63 if not signed
//   Paired, Whole                     the orders of bytes
//   Bytes units(p, at)                unit u: 16 bytes at p + at(u). Where all are 32 apart, they
//       are of one run of whole pieces of 32 bytes, and all of that is read
//   Bytes add_where(q, bits, bit, value)  q + value where bits has the bit; q has none of value's
//   Bytes add_flagged<at>(q, header, value)  the same for byte e of a unit where bit e of the 16
//       in bytes at, at + 1 of the header's unit is set
//   F32 spread(F32x8, part)           one number per group of 32 -> the lanes of a pair's sums
//   F32 spread(F32x16, part)          one per 16 -> the lanes of one part in order `Whole`
//   F32 widened(F32x8)                a register with the same sum
//   F32x16 widen_u8, widen_s8(U8x16); F32x8 widen8_u8, widen8_s8, widen8_f16 of the first 8
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
