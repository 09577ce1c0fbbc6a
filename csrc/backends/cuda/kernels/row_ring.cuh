// A warp's ring in shared memory: stages of two rows of packed weights, copied ahead of their use.
//
// A stage holds a segment of each row, plane by plane (packed.h). Lane 2 p + r copies plane p of
// row r: with the copy engine where there is one, else with all lanes in pieces of 16 bytes. Code
// is short on purpose, see matvec.cuh.
#pragma once

#include "backends/cuda/kernels/copy_engine.cuh"
#include "backends/cuda/matvec.h"

#if defined(MLA_HAS_WARPGROUPS) || defined(MLA_CUDA_EMULATE)
#define MLA_RING_HAS_ENGINE
#endif

namespace mla::cuda {

template <int kPlanes, int kStages, int kStageBytes>
class RowRing {
 public:
  static constexpr int kBarrierBytes = 8 * kStages;
  static constexpr int kBytes = kStages * kStageBytes;

  // smem: kBytes at a multiple of 16; barriers: kBarrierBytes at a multiple of 8.
  __device__ __forceinline__ RowRing(const SegmentPlanes& planes, int row_bytes, std::byte* smem,
                                     std::byte* barriers)
      : smem_(smem), barriers_(barriers), plane_(min(lane_id() / 2, kPlanes - 1)) {
    first_ = planes.at[plane_];
    end_ = plane_ + 1 < kPlanes ? planes.at[plane_ + 1] : row_bytes;
    bytes_ = planes.bytes[plane_];
    to_ = lane_id() % 2 * (kStageBytes / 2) + planes.stage_at[plane_];
#ifdef MLA_RING_HAS_ENGINE
    if (lane_id() == 0) {
#pragma unroll
      for (int s = 0; s < kStages; ++s) barrier_init(barrier(s), 2 * kPlanes);
      fence_barriers();
    }
    __syncwarp();
#endif
  }

  // Begins to copy a segment of two rows to the next free stage. row: of lane % 2.
  __device__ __forceinline__ void push(const std::byte* row, int segment) {
    const int from = first_ + segment * bytes_;
    const int n = min(bytes_, end_ - from);
#ifdef MLA_RING_HAS_ENGINE
    if (lane_id() < 2 * kPlanes) {
      barrier_expect(barrier(free_), n);
      copy_bytes(shared_address(smem_ + free_ * kStageBytes + to_), row + from, n, barrier(free_));
    }
#else
#pragma unroll 1
    for (int lane = 0; lane < 2 * kPlanes; ++lane) {
      const auto source = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(row + from), lane);
      const int size = __shfl_sync(kAllLanes, n, lane);
      const int to = free_ * kStageBytes + __shfl_sync(kAllLanes, to_, lane);
      for (int at = 16 * lane_id(); at < size; at += 16 * kWarpThreads) {
        cp_async16(smem_ + to + at, reinterpret_cast<const std::byte*>(source) + at);
      }
    }
    cp_async_commit();
#endif
    free_ = free_ + 1 == kStages ? 0 : free_ + 1;
  }
  // In place of a push where nothing is left.
  __device__ __forceinline__ void push_nothing() {
#ifndef MLA_RING_HAS_ENGINE
    cp_async_commit();
#endif
  }

  // Waits for the oldest stage.
  __device__ __forceinline__ const std::byte* front() {
#ifdef MLA_RING_HAS_ENGINE
    barrier_wait(barrier(front_), parity_);
#else
    cp_async_wait<kStages - 1>();
    __syncwarp();
#endif
    return smem_ + front_ * kStageBytes;
  }
  // No lane reads it any more: it is free.
  __device__ __forceinline__ void pop() {
    __syncwarp();
    if (++front_ == kStages) {
      front_ = 0;
      parity_ ^= 1;
    }
  }

 private:
#ifdef MLA_RING_HAS_ENGINE
  __device__ __forceinline__ SharedAddress barrier(int stage) {
    return shared_address(barriers_ + 8 * stage);
  }
#endif
  std::byte* smem_;
  std::byte* barriers_;
  int plane_, first_, end_, bytes_, to_;
  int free_ = 0, front_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace mla::cuda
