// The copy engine of capability 9.0 (code for sm_90a): barriers in shared memory that count bytes,
// and copies of boxes of a matrix that report to them; and wide products of warpgroups, see
// warpgroup.cuh, from what it copied.
//
// A box is 64 columns of 16-bit numbers wide: a row is 128 bytes, rows lie one after another, and
// the 16-byte piece c of row r lies at place c ^ (r % 8). Boxes begin at multiples of 1024 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "backends/cuda/kernels/warpgroup.cuh"
#include "backends/cuda/tensor_map.h"

#ifdef MLA_CUDA_EMULATE
#include <emulator/copy_engine.h>
#else

namespace mla::cuda {

using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const std::byte* smem) {
  return smem_address(smem);
}

#ifdef MLA_HAS_WARPGROUPS

// ---- barriers: 8 bytes each ---------------------------------------------------------------------

// One thread; a fence_barriers() and a __syncthreads() follow before anything uses it.
__device__ __forceinline__ void barrier_init(SharedAddress barrier, int n_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(n_arrivals)
               : "memory");
}
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives; the phase also waits for that many bytes of copies.
__device__ __forceinline__ void barrier_expect(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended; before any has, the phase of parity 1 counts as ended.
__device__ __forceinline__ void barrier_wait(SharedAddress barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// ---- copies of bytes ----------------------------------------------------------------------------

// n bytes, a multiple of 16, between addresses that are.
__device__ __forceinline__ void copy_bytes(SharedAddress smem, const void* global, int n,
                                           SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem),
      "l"(global), "r"(n), "r"(barrier)
      : "memory");
}

// ---- copies of boxes ----------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at (column, row, matrix); elements outside the tensor become zeros and count as bytes.
__device__ __forceinline__ void copy_box(SharedAddress smem, const TensorMap* map,
                                         SharedAddress barrier, int column, int row, int matrix) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5}], [%2];" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(matrix)
      : "memory");
}

// ---- products -----------------------------------------------------------------------------------

// Rows of 64 columns from this address on, as copies of boxes leave them. A step of 16 columns
// adds 32 bytes to the address. The second stride has no meaning here.
__device__ __forceinline__ SharedMatrix rows_of_boxes(SharedAddress smem) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | uint64_t{1} << 16 | ((smem & 0x3ffffu) >> 4);
}

// As warpgroup_hold() of warpgroup.cuh.
template <int N>
__device__ __forceinline__ void hold_sums(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define MLA_SUMS_8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MLA_WGMMA_N128(type)                                                                  \
  asm volatile(                                                                               \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                            \
      " "                                                                                     \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "     \
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, " \
      "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
      "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                         \
      "%64, %65, 1, 1, 1, 0, 0;"                                                              \
      : MLA_SUMS_8(0), MLA_SUMS_8(8), MLA_SUMS_8(16), MLA_SUMS_8(24), MLA_SUMS_8(32),         \
        MLA_SUMS_8(40), MLA_SUMS_8(48), MLA_SUMS_8(56)                                        \
      : "l"(a), "l"(b))
#define MLA_WGMMA_N256(type)                                                                  \
  asm volatile(                                                                               \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                            \
      " "                                                                                     \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "     \
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, " \
      "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
      "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, " \
      "%69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
      "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, "    \
      "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, "  \
      "%116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "             \
      "%128, %129, 1, 1, 1, 0, 0;"                                                            \
      : MLA_SUMS_8(0), MLA_SUMS_8(8), MLA_SUMS_8(16), MLA_SUMS_8(24), MLA_SUMS_8(32),         \
        MLA_SUMS_8(40), MLA_SUMS_8(48), MLA_SUMS_8(56), MLA_SUMS_8(64), MLA_SUMS_8(72),       \
        MLA_SUMS_8(80), MLA_SUMS_8(88), MLA_SUMS_8(96), MLA_SUMS_8(104), MLA_SUMS_8(112),     \
        MLA_SUMS_8(120)                                                                       \
      : "l"(a), "l"(b))

// d += a b^T for 64 rows of a, 2 * N rows of b and 16 columns of both; a warp has 16 of the rows:
// d[4 j + e] is that of mma_f16's d[e], at columns 8 j.
template <class Element, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[N], SharedMatrix a, SharedMatrix b) {
  static_assert(N == 64 || N == 128);
  constexpr bool half = std::is_same_v<Element, __half>;
  if constexpr (N == 64 && half) MLA_WGMMA_N128("f16");
  if constexpr (N == 64 && !half) MLA_WGMMA_N128("bf16");
  if constexpr (N == 128 && half) MLA_WGMMA_N256("f16");
  if constexpr (N == 128 && !half) MLA_WGMMA_N256("bf16");
}
#undef MLA_WGMMA_N256
#undef MLA_WGMMA_N128
#undef MLA_SUMS_8

#endif

}  // namespace mla::cuda
#endif
