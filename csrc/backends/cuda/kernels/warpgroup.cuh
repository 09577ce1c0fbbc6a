// Products of warpgroups (capability 9.0, code for sm_90a): four warps multiply [64, 16] by [16,
// 128] out of shared memory, while they do something else.
//
// Operands in shared memory are panels of 128-byte rows (64 halves), rows one after the other, the
// 16-byte pieces of a row permuted by row % 8 (piece_at() with row_bytes = 128); panels begin at
// multiples of 1024 bytes. Sums: warp w of the group has rows 16 w .. 16 w + 15 as in
// intrinsics.cuh, d[i] being columns 8 i .. 8 i + 7.
//
// The order: warpgroup_fence(), products, warpgroup_commit(), warpgroup_wait(), and
// warpgroup_hold() for every array of sums that a wait has completed, before it is looked at.
#pragma once

#include "backends/cuda/kernels/intrinsics.cuh"

// Where it is not defined, kernels that multiply so are empty, and nobody launches them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(MLA_CUDA_EMULATE)
#define MLA_HAS_WARPGROUPS
#endif

#ifdef MLA_CUDA_EMULATE
#include <emulator/warpgroup.h>
#else

namespace mla::cuda {

// An operand: where it begins and how it goes on from eight rows to the next.
using SharedMatrix = uint64_t;

// rows_of_8_bytes: from eight rows to the next eight; panel_bytes: from a panel to the next, of a
// matrix that is 128 columns wide and contracted along its rows.
__device__ __forceinline__ SharedMatrix shared_matrix(const void* smem, int rows_of_8_bytes,
                                                      int panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | static_cast<uint64_t>(rows_of_8_bytes >> 4) << 32 |
         static_cast<uint64_t>(panel_bytes >> 4) << 16 | (smem_address(smem) & 0x3ffff) >> 4;
}
__device__ __forceinline__ SharedMatrix advance(SharedMatrix m, int n_bytes) {
  return m + static_cast<uint64_t>(n_bytes >> 4);
}

// Shared memory written by this thread can be seen by products that follow a barrier.
__device__ __forceinline__ void fence_shared_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Registers written by this thread can be operands and sums.
__device__ __forceinline__ void warpgroup_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most N committed groups of products are under way.
template <int N>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The compiler reads the sums here at the earliest.
__device__ __forceinline__ void warpgroup_hold(float (&d)[16][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(d[i][j])::"memory");
  }
}

// clang-format off
#define MLA_SUM_NAMES \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MLA_SUMS(d) \
  "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), \
  "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), \
  "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), \
  "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), \
  "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), \
  "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), \
  "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), \
  "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]), \
  "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), \
  "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), \
  "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), \
  "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]), \
  "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), \
  "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]), \
  "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), \
  "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])
// clang-format on

// d = a b^T (+ d): a [64][16] and b [128][16], both contiguous along the 16.
__device__ __forceinline__ void warpgroup_mma(float (&d)[16][4], SharedMatrix a, SharedMatrix b,
                                              bool adds) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %66, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" MLA_SUM_NAMES
      "}, %64, %65, p, 1, 1, 0, 0;}"
      : MLA_SUMS(d)
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
}

// d += a b: a [64][16] in the fragments of mma_f16(), b [16][128] with rows of two panels.
__device__ __forceinline__ void warpgroup_mma(float (&d)[16][4], const uint32_t (&a)[4],
                                              SharedMatrix b) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, 1, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" MLA_SUM_NAMES
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;}"
      : MLA_SUMS(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef MLA_SUM_NAMES
#undef MLA_SUMS

// Registers per thread from here on, a multiple of 8; all of a warpgroup call.
template <int N>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace mla::cuda
#endif
