// Twins of what backends/cuda/kernels/intrinsics.cuh has for the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/device.h"
#include "emulator/matrix.h"

#define MLA_CUDA_ARCH 900

namespace mla::cuda {

inline void pdl_wait() { emulator::note_pdl_wait(); }
inline void pdl_release() {}

template <class T = std::byte>
T* dynamic_smem() {
  return reinterpret_cast<T*>(emulator::dynamic_memory());
}

inline void bar_sync(int id, int n_threads) { emulator::barrier(id, n_threads, true); }
inline void bar_arrive(int id, int n_threads) { emulator::barrier(id, n_threads, false); }

inline void cp_async16(void* smem, const void* global, bool valid = true) {
  emulator::copy_later(smem, global, 16, valid);
}
inline void cp_async8(void* smem, const void* global, bool valid = true) {
  emulator::copy_later(smem, global, 8, valid);
}
inline void cp_async4(void* smem, const void* global, bool valid = true) {
  emulator::copy_later(smem, global, 4, valid);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int N>
void cp_async_wait() {
  emulator::wait_copies(N);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem) {
  emulator::load_matrices(r, smem, 4, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem) {
  emulator::load_matrices(r, smem, 4, true);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem) {
  emulator::load_matrices(r, smem, 2, false);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem) {
  emulator::load_matrices(r, smem, 2, true);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(d, a, b, false);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(d, a, b, true);
}

inline int dp4a(int a, int b, int c) { return __dp4a(a, b, c); }
inline float exp2_approx(float x) { return exp2f(x); }

// Vector loads are as wide as their types, and so must be their addresses.
template <class T>
T load_aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) emulator::fail("an unaligned load");
  return *p;
}
template <class T>
T load_streaming(const T* p) {
  return load_aligned(p);
}
template <class T>
T load_coherent(const T* p) {
  return load_aligned(p);
}
inline void prefetch_l2(const void*) {}

}  // namespace mla::cuda
