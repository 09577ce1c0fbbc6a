// Everything that is written in the device's own language: matrix units, shared memory's copies
// and barriers, loads with a policy, dependent launch. Reductions built of them stand at the end.
//
// Fragments of a 16 x 8 x 16 product, lane = 4 * g + t (g = 0..7, t = 0..3), two halves a register:
//   a[0] = A[g][2t, 2t+1]     a[1] = A[g+8][2t, 2t+1]     a[2] = A[g][2t+8, 2t+9]
//   a[3] = A[g+8][2t+8, 2t+9] b[0] = B[2t, 2t+1][g]       b[1] = B[2t+8, 2t+9][g]
//   d[0] = D[g][2t]           d[1] = D[g][2t+1]           d[2] = D[g+8][2t]     d[3] = D[g+8][2t+1]
// where A is 16 x 16, B 16 (k) x 8 and D 16 x 8. The lower half of a register has the lower index.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#ifdef MLA_CUDA_EMULATE
#include <emulator/intrinsics.h>
#else

#ifdef __CUDA_ARCH__
#define MLA_CUDA_ARCH __CUDA_ARCH__
#else
#define MLA_CUDA_ARCH 0
#endif

namespace mla::cuda {

// ---- dependent launch ---------------------------------------------------------------------------

// Lets the next kernel start, as far as there is room for it. Kernels do so once they have waited:
// earlier, kernel after kernel would start, and the blocks that wait hold room from those that
// work.
__device__ __forceinline__ void pdl_release() {
#if MLA_CUDA_ARCH >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns once every kernel before this one has ended and its results can be seen. Loads of what
// those kernels write must not be marked const __restrict__ or __ldg: such loads may be moved up.
__device__ __forceinline__ void pdl_wait() {
#if MLA_CUDA_ARCH >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  pdl_release();
}
__device__ __forceinline__ void pdl_trigger() {}

// ---- shared memory ------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 1024 bytes.
template <class T = std::byte>
__device__ __forceinline__ T* dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char mla_dynamic_smem[];
  return reinterpret_cast<T*>(mla_dynamic_smem);
}

__device__ __forceinline__ uint32_t smem_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

// Barrier id (1..15; 0 is that of __syncthreads) of n_threads threads, whole warps.
__device__ __forceinline__ void bar_sync(int id, int n_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

// Counts towards the barrier without waiting for it.
__device__ __forceinline__ void bar_arrive(int id, int n_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

// ---- copies into shared memory ------------------------------------------------------------------

// The copy may be seen once cp_async_wait has returned in this thread, and by other threads after a
// barrier behind that. Both addresses are multiples of its size. Where !valid, zeros are written
// and global memory is not read.
#if MLA_CUDA_ARCH >= 800 || MLA_CUDA_ARCH == 0
__device__ __forceinline__ void cp_async16(void* smem, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(smem)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async8(void* smem, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem_address(smem)),
               "l"(global), "r"(valid ? 8 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async4(void* smem, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_address(smem)),
               "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N of this thread's committed groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#else  // copies are made at once
__device__ __forceinline__ void cp_async16(void* smem, const void* global, bool valid = true) {
  const uint4 zero = {0, 0, 0, 0};
  *static_cast<uint4*>(smem) = valid ? *static_cast<const uint4*>(global) : zero;
}
__device__ __forceinline__ void cp_async8(void* smem, const void* global, bool valid = true) {
  const uint2 zero = {0, 0};
  *static_cast<uint2*>(smem) = valid ? *static_cast<const uint2*>(global) : zero;
}
__device__ __forceinline__ void cp_async4(void* smem, const void* global, bool valid = true) {
  *static_cast<uint32_t*>(smem) = valid ? *static_cast<const uint32_t*>(global) : 0u;
}
__device__ __forceinline__ void cp_async_commit() {}
template <int N>
__device__ __forceinline__ void cp_async_wait() {}
#endif

// ---- matrices -----------------------------------------------------------------------------------

// Loads 8 x 8 matrices of 2-byte elements. Lane 8 * i + r gives the address of row r of matrix i,
// 16 bytes at a multiple of 16; r[i] becomes M_i[g][2t, 2t+1], or M_i[2t, 2t+1][g] where
// transposed. x2 looks at the addresses of lanes 0..15 only, but all lanes must give one.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(smem))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(smem))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_address(smem))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_address(smem))
               : "memory");
}

// d += a * b, halves multiplied exactly and summed as floats.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
#if MLA_CUDA_ARCH >= 800 || MLA_CUDA_ARCH == 0
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}

#if MLA_CUDA_ARCH < 800 && MLA_CUDA_ARCH != 0
__device__ __forceinline__ float bf16_dot2(uint32_t x, uint32_t y, float sum) {
  sum = fmaf(__uint_as_float(x << 16), __uint_as_float(y << 16), sum);
  return fmaf(__uint_as_float(x & 0xffff0000u), __uint_as_float(y & 0xffff0000u), sum);
}
#endif

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#if MLA_CUDA_ARCH >= 800 || MLA_CUDA_ARCH == 0
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // no matrix unit for the format: lanes pass their fragments around
  const int lane = static_cast<int>(threadIdx.x & 31u);
  const int row = lane / 4 * 4, column = lane % 4 * 8;
  for (int quarter = 0; quarter < 4; ++quarter) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t low = __shfl_sync(0xffffffffu, a[2 * half], row + quarter);
      const uint32_t high = __shfl_sync(0xffffffffu, a[2 * half + 1], row + quarter);
      const uint32_t left = __shfl_sync(0xffffffffu, b[half], column + quarter);
      const uint32_t right = __shfl_sync(0xffffffffu, b[half], column + 4 + quarter);
      d[0] = bf16_dot2(low, left, d[0]);
      d[1] = bf16_dot2(low, right, d[1]);
      d[2] = bf16_dot2(high, left, d[2]);
      d[3] = bf16_dot2(high, right, d[3]);
    }
  }
#endif
}

// ---- arithmetic and loads -----------------------------------------------------------------------

// c + the dot product of four signed bytes each.
__device__ __forceinline__ int dp4a(int a, int b, int c) { return __dp4a(a, b, c); }

// 2^x; error 2 units in the last place, denormal results become 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Constants that are read once: they do not displace what L1 holds.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_streaming(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p));
  return v;
}
__device__ __forceinline__ uint32_t load_streaming(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// What other blocks of this kernel or the kernels before wrote: past L1, which may be stale.
__device__ __forceinline__ uint4 load_coherent(const uint4* p) { return __ldcg(p); }
__device__ __forceinline__ float4 load_coherent(const float4* p) { return __ldcg(p); }
__device__ __forceinline__ float2 load_coherent(const float2* p) { return __ldcg(p); }
__device__ __forceinline__ float load_coherent(const float* p) { return __ldcg(p); }
__device__ __forceinline__ int load_coherent(const int* p) { return __ldcg(p); }

// Asks for the 128 bytes around p to come into L2.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

}  // namespace mla::cuda
#endif

namespace mla::cuda {

// ---- reductions ---------------------------------------------------------------------------------

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kWarpThreads = 32;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x & 31u); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / 32u); }

// The same in every lane; all 32 take part.
__device__ __forceinline__ float warp_sum(float x) {
  for (int step = kWarpThreads / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int step = kWarpThreads / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  }
  return x;
}
__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#if !defined(MLA_CUDA_EMULATE) && MLA_CUDA_ARCH >= 800
  return __reduce_max_sync(kAllLanes, x);
#else
  for (int step = kWarpThreads / 2; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, x, step);
    x = x > other ? x : other;
  }
  return x;
#endif
}
__device__ __forceinline__ int warp_sum(int x) {
  for (int step = kWarpThreads / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// The same in every thread of a one-dimensional block of whole warps. smem32 holds 32 floats; it
// may be used again at once.
__device__ __forceinline__ float block_sum(float x, float* smem32) {
  x = warp_sum(x);
  if (lane_id() == 0) smem32[warp_id()] = x;
  __syncthreads();
  const int n_warps = static_cast<int>(blockDim.x) / kWarpThreads;
  x = warp_sum(lane_id() < n_warps ? smem32[lane_id()] : 0.0f);
  __syncthreads();
  return x;
}
__device__ __forceinline__ float block_max(float x, float* smem32) {
  x = warp_max(x);
  if (lane_id() == 0) smem32[warp_id()] = x;
  __syncthreads();
  const int n_warps = static_cast<int>(blockDim.x) / kWarpThreads;
  x = warp_max(lane_id() < n_warps ? smem32[lane_id()] : smem32[0]);
  __syncthreads();
  return x;
}

}  // namespace mla::cuda
