// The device's arithmetic functions that a host compiler does not know. Approximations are exact
// here: what depends on their error is for hardware to show.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

// ---- as the device names them -------------------------------------------------------------------

inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline unsigned long max(unsigned long a, unsigned long b) { return a > b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline void sincospif(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(sin(M_PI * static_cast<double>(x)));
  *cosine = static_cast<float>(cos(M_PI * static_cast<double>(x)));
}
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline void __sincosf(float x, float* sine, float* cosine) { sincosf(x, sine, cosine); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
// Apart, so that the host compiler cannot fuse them with what stands around.
__attribute__((noinline)) inline float __fmul_rn(float x, float y) { return x * y; }
__attribute__((noinline)) inline float __fadd_rn(float x, float y) { return x + y; }
__attribute__((noinline)) inline float __fsub_rn(float x, float y) { return x - y; }

// ---- bits ---------------------------------------------------------------------------------------

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(ceilf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
// Byte i of the result is byte (selector's nibble i, 3 bits) of y:x; its fourth bit spreads the
// sign.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i) & 15u;
    auto byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7u)) & 0xffu);
    if ((nibble & 8u) != 0) byte = (byte & 0x80u) != 0 ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31u)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31u));
}
inline int __mul24(int x, int y) { return x * y; }
inline int __mulhi(int x, int y) { return static_cast<int>((int64_t{x} * y) >> 32); }
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>((uint64_t{x} * y) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<unsigned long long>((static_cast<Wide>(x) * y) >> 64);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i)
    c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 0xffu) * (b >> (8 * i) & 0xffu);
  return c;
}

namespace mla::emulator {

// f of each byte of two words.
template <class F>
unsigned each_byte(unsigned a, unsigned b, F f) {
  unsigned result = 0;
  for (int i = 0; i < 32; i += 8) {
    result |= (static_cast<unsigned>(f(a >> i & 0xffu, b >> i & 0xffu)) & 0xffu) << i;
  }
  return result;
}

}  // namespace mla::emulator

inline unsigned __vadd4(unsigned a, unsigned b) {
  return mla::emulator::each_byte(a, b, [](unsigned x, unsigned y) { return x + y; });
}
inline unsigned __vsub4(unsigned a, unsigned b) {
  return mla::emulator::each_byte(a, b, [](unsigned x, unsigned y) { return x - y; });
}
inline unsigned __vsubss4(unsigned a, unsigned b) {
  return mla::emulator::each_byte(a, b, [](unsigned x, unsigned y) {
    const int difference = static_cast<int8_t>(x) - static_cast<int8_t>(y);
    return difference > 127 ? 127 : difference < -128 ? -128 : difference;
  });
}
inline unsigned __vcmpne4(unsigned a, unsigned b) {
  return mla::emulator::each_byte(a, b, [](unsigned x, unsigned y) { return x != y ? 0xffu : 0u; });
}

// ---- loads and stores with a policy -------------------------------------------------------------

#define MLA_EMULATED_LOAD(name)             \
  template <class T>                        \
  std::remove_const_t<T> name(const T* p) { \
    return *p;                              \
  }
#define MLA_EMULATED_STORE(name)                   \
  template <class T>                               \
  void name(T* p, std::type_identity_t<T> value) { \
    *p = value;                                    \
  }
MLA_EMULATED_LOAD(__ldg)
MLA_EMULATED_LOAD(__ldcg)
MLA_EMULATED_LOAD(__ldca)
MLA_EMULATED_LOAD(__ldcs)
MLA_EMULATED_LOAD(__ldlu)
MLA_EMULATED_LOAD(__ldcv)
MLA_EMULATED_STORE(__stwb)
MLA_EMULATED_STORE(__stcg)
MLA_EMULATED_STORE(__stcs)
MLA_EMULATED_STORE(__stwt)
#undef MLA_EMULATED_LOAD
#undef MLA_EMULATED_STORE

// ---- halves: what their headers have for devices alone ------------------------------------------

// A product of two halves and a third are exact in a double but for the last bits of far-off sums.
inline __half __hfma(__half a, __half b, __half c) {
  const double product =
      static_cast<double>(__half2float(a)) * static_cast<double>(__half2float(b));
  return __double2half(product + static_cast<double>(__half2float(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  const double product =
      static_cast<double>(__bfloat162float(a)) * static_cast<double>(__bfloat162float(b));
  return __double2bfloat16(product + static_cast<double>(__bfloat162float(c)));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                        __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)),
                            __hfma(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}
inline __half hexp2(__half x) { return __float2half(exp2f(__half2float(x))); }
inline __half hexp(__half x) { return __float2half(expf(__half2float(x))); }
inline __half2 h2exp2(__half2 x) {
  return __halves2half2(hexp2(__low2half(x)), hexp2(__high2half(x)));
}
inline int __half2int_rn(__half x) { return __float2int_rn(__half2float(x)); }
