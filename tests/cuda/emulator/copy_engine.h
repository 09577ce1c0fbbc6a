// Twins of what backends/cuda/kernels/copy_engine.cuh has for the device. Copies and products are
// made at once; barriers count as the device's do.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/block.h"
#include "emulator/warpgroup.h"

namespace mla::cuda {

using SharedAddress = std::byte*;

inline SharedAddress shared_address(std::byte* smem) { return smem; }

// ---- barriers -----------------------------------------------------------------------------------

struct EmulatedBarrier {
  uint16_t n_arrivals, n_missing;
  uint32_t parity : 1;  // of the phase that has not ended
  int32_t bytes : 31;   // expected and not yet come
};
static_assert(sizeof(EmulatedBarrier) == 8);

inline EmulatedBarrier& emulated_barrier(SharedAddress barrier) {
  return *reinterpret_cast<EmulatedBarrier*>(barrier);
}
inline void end_phase_if_complete(EmulatedBarrier& b) {
  if (b.n_missing != 0 || b.bytes != 0) return;
  b.parity ^= 1u;
  b.n_missing = b.n_arrivals;
}
inline void barrier_init(SharedAddress barrier, int n_arrivals) {
  const auto n = static_cast<uint16_t>(n_arrivals);
  emulated_barrier(barrier) = {n, n, 0, 0};
}
inline void fence_barriers() {}
inline void barrier_expect(SharedAddress barrier, int bytes) {
  EmulatedBarrier& b = emulated_barrier(barrier);
  if (b.n_missing == 0) emulator::fail("a barrier in shared memory has too many arrivals");
  b.bytes += bytes;
  --b.n_missing;
  end_phase_if_complete(b);
}
inline void barrier_arrive(SharedAddress barrier) { barrier_expect(barrier, 0); }
inline void barrier_wait(SharedAddress barrier, uint32_t parity) {
  while (emulated_barrier(barrier).parity == parity) emulator::yield();
}

// ---- copies of bytes ----------------------------------------------------------------------------

inline void copy_bytes(SharedAddress smem, const void* global, int n, SharedAddress barrier) {
  const auto addresses = reinterpret_cast<uintptr_t>(smem) | reinterpret_cast<uintptr_t>(global);
  if ((addresses | static_cast<uintptr_t>(n)) % 16 != 0) emulator::fail("copy_bytes: unaligned");
  std::memcpy(smem, global, static_cast<size_t>(n));
  EmulatedBarrier& b = emulated_barrier(barrier);
  b.bytes -= n;
  end_phase_if_complete(b);
}

// ---- copies of boxes ----------------------------------------------------------------------------

inline void prefetch_map(const TensorMap*) {}

inline SharedAddress swizzled(SharedAddress p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return reinterpret_cast<SharedAddress>(address ^ (address >> 7 & 7) << 4);
}

inline void copy_box(SharedAddress smem, const TensorMap* map, SharedAddress barrier, int column,
                     int row, int matrix) {
  constexpr int kColumns = 64, kBytes = 2;
  if (reinterpret_cast<uintptr_t>(smem) % 1024 != 0) emulator::fail("copy_box: unaligned");
  const MatrixLayout& m = map->matrix;
  for (int r = 0; r < map->box_rows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      const bool inside = row + r < m.n_rows && column + c < m.n_columns && matrix < m.n_matrices;
      const int64_t at = matrix * m.matrix_stride + (row + r) * m.row_stride + column + c;
      uint16_t value = 0;
      if (inside) value = static_cast<const uint16_t*>(m.data)[at];
      std::memcpy(swizzled(smem + (r * kColumns + c) * kBytes), &value, kBytes);
    }
  }
  EmulatedBarrier& b = emulated_barrier(barrier);
  b.bytes -= map->box_rows * kColumns * kBytes;
  end_phase_if_complete(b);
}

// ---- products -----------------------------------------------------------------------------------

inline SharedMatrix rows_of_boxes(SharedAddress smem) { return shared_matrix(smem, 1024, 0); }

template <int N>
void hold_sums(float (&)[N]) {}

template <class Element>
void load_columns(const SharedMatrix& m, int row, float (&out)[16]) {
  for (int k = 0; k < 16; ++k) {
    std::byte* p =
        const_cast<std::byte*>(m.begin) + row / 8 * m.rows_of_8_bytes + row % 8 * 128 + 2 * k;
    out[k] = static_cast<float>(*reinterpret_cast<const Element*>(swizzled(p)));
  }
}

template <class Element, int N>
void multiply_rows(float (&d)[N], const SharedMatrix& a, const SharedMatrix& b) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int first = static_cast<int>(threadIdx.x / 32 % 4) * 16 + lane / 4;
  float rows[2][16], column[16];
  for (int half = 0; half < 2; ++half) load_columns<Element>(a, first + 8 * half, rows[half]);
  for (int j = 0; j < N / 4; ++j) {
    for (int side = 0; side < 2; ++side) {
      load_columns<Element>(b, 8 * j + lane % 4 * 2 + side, column);
      for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < 16; ++k) d[4 * j + 2 * half + side] += rows[half][k] * column[k];
      }
    }
  }
}

}  // namespace mla::cuda
