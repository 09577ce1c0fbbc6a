// Twins of what backends/cuda/kernels/warpgroup.cuh has for the device. Products are made at once.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "emulator/intrinsics.h"

namespace mla::cuda {

struct SharedMatrix {
  const std::byte* begin;
  int rows_of_8_bytes, panel_bytes;

  // The half at column `column` of row `row`, where rows are 128 bytes.
  float at(int row, int column) const {
    const std::byte* p = begin + column / 64 * panel_bytes + row / 8 * rows_of_8_bytes +
                         row % 8 * 128 + column % 64 * 2;
    auto address = reinterpret_cast<uintptr_t>(p);
    address ^= (address >> 7 & 7) << 4;
    return __half2float(*reinterpret_cast<const __half*>(address));
  }
};

inline SharedMatrix shared_matrix(const void* smem, int rows_of_8_bytes, int panel_bytes) {
  return {static_cast<const std::byte*>(smem), rows_of_8_bytes, panel_bytes};
}
inline SharedMatrix advance(SharedMatrix m, int n_bytes) {
  return {m.begin + n_bytes, m.rows_of_8_bytes, m.panel_bytes};
}

inline void fence_shared_products() {}
inline void warpgroup_fence() {}
inline void warpgroup_commit() {}
template <int N>
void warpgroup_wait() {}
inline void warpgroup_hold(float (&)[16][4]) {}
template <int N>
void take_registers() {}
template <int N>
void give_registers() {}

inline void warpgroup_mma(float (&d)[16][4], SharedMatrix a, SharedMatrix b, bool adds) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int first = static_cast<int>(threadIdx.x / 32 % 4) * 16 + lane / 4;
  for (int j = 0; j < 4; ++j) {
    float row[16];
    for (int k = 0; k < 16; ++k) row[k] = a.at(first + j / 2 * 8, k);
    for (int i = 0; i < 16; ++i) {
      float sum = adds ? d[i][j] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += row[k] * b.at(8 * i + lane % 4 * 2 + j % 2, k);
      d[i][j] = sum;
    }
  }
}

inline void warpgroup_mma(float (&d)[16][4], const uint32_t (&a)[4], SharedMatrix b) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float rows[2][16];
  for (int quarter = 0; quarter < 4; ++quarter) {
    for (int r = 0; r < 4; ++r) {
      const uint32_t bits = __shfl_sync(0xffffffffu, a[r], lane / 4 * 4 + quarter);
      const int k = r / 2 * 8 + quarter * 2;
      rows[r % 2][k] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
      rows[r % 2][k + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)));
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int k = 0; k < 16; ++k) {
        d[i][j] += rows[j / 2][k] * b.at(k, 8 * i + lane % 4 * 2 + j % 2);
      }
    }
  }
}

}  // namespace mla::cuda
