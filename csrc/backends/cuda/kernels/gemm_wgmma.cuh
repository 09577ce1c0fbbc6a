// c = a b^T on warpgroups, for devices of capability 9.0: dense and grouped, see gemm.h.
//
// A block of three warpgroups computes tiles of TileM x TileN, one after another. The first brings
// 64 columns of both operands at a time into a ring of stages
//
//   [TileM rows of a, 128 bytes each][TileN rows of b, 128 bytes each]   (swizzled, see
//   copy_engine.cuh)
//
// the other two multiply: 64 rows of a each where TileM is 128, else half the rows of b each. A
// stage is full when its bytes have come, empty when the 8 warps have done with it. Boxes of b are
// a quarter or half of the tile; fused, they alternate between b and b_up, so that every thread has
// the gate and up of the same columns.
//
// Gathered rows of a do not form boxes: all 128 threads of the first warpgroup copy them, 16 bytes
// each, and count a stage as full kLag stages later, when the copies have come.
//
// Error: that of float32 sums of exact products, k * 2^-24 of the sum of magnitudes.
#pragma once

#include "backends/cuda/kernels/copy_engine.cuh"
#include "backends/cuda/kernels/gemm_tiles.cuh"

namespace mla::cuda {

inline constexpr int kWarpgroup = 128;
inline constexpr int kWgmmaThreads = 3 * kWarpgroup;
inline constexpr int kWgmmaColumns = 64;  // of k, in a stage
inline constexpr int kWgmmaRowBytes = 2 * kWgmmaColumns;

template <int TileM, int TileN>
struct WgmmaShape {
  static constexpr int kGroupsN = TileM == 128 ? 1 : 2;  // warpgroups that share TileN
  static constexpr int kGroupColumns = TileN / kGroupsN;
  static constexpr int kBoxes = 2 * kGroupsN, kBoxRows = TileN / kBoxes;
  static constexpr int kBytesA = TileM * kWgmmaRowBytes, kBytesB = TileN * kWgmmaRowBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  // 227 KB less 4 KB for the rest: 4 of 48 KB, 5 of 40 KB, 6 of 32 KB.
  static constexpr int kStages = 223 * 1024 / kStageBytes;
  static constexpr int kBarrierBytes = 2 * kStages * 8;
  static constexpr int kSmemBytes = kStages * kStageBytes + kBarrierBytes + TileMap::kSharedBytes;
  // A stage is released one product later, so that lag and release together must fit the ring.
  static constexpr int kLag = 2;
  static_assert(kLag <= kStages - 2);
};

// 168 registers a thread at entry, 3 * 168 = 56 + 2 * 224.
inline constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

#ifdef MLA_HAS_WARPGROUPS

// The ring as one role walks it.
template <class Shape>
struct Ring {
  SharedAddress stages, barriers;
  int slot = 0;
  uint32_t phase = 0;

  __device__ SharedAddress a() const { return stages + slot * Shape::kStageBytes; }
  __device__ SharedAddress b() const { return a() + Shape::kBytesA; }
  __device__ SharedAddress full() const { return barriers + 8 * slot; }
  __device__ SharedAddress empty() const { return full() + 8 * Shape::kStages; }
  __device__ void next() {
    if (++slot < Shape::kStages) return;
    slot = 0;
    phase ^= 1;
  }
};

struct Maps {
  const TensorMap *a, *b, *b_up;
};

__device__ inline int steps_of(const Tile& t) {
  return (t.k_end - t.k_begin + kWgmmaColumns - 1) / kWgmmaColumns;
}

template <class Shape>
__device__ inline void copy_b(const GemmParams& p, const Maps& maps, const Ring<Shape>& ring,
                              const Tile& t, int k) {
  const bool fused = p.b_up != nullptr;
  const int matrix = p.batch_b == 0 ? 0 : t.matrix;
#pragma unroll
  for (int i = 0; i < Shape::kBoxes; ++i) {
    const int column = t.column + (fused ? i / 2 : i) * Shape::kBoxRows;
    copy_box(ring.b() + i * Shape::kBoxRows * kWgmmaRowBytes,
             fused && i % 2 == 1 ? maps.b_up : maps.b, ring.full(), k, column, matrix);
  }
}

// One thread.
template <class Shape>
__device__ inline void produce_boxes(const GemmParams& p, const TileMap& map, const Maps& maps,
                                     Ring<Shape> ring) {
  const bool batched = p.offsets == nullptr && p.batch_a != 0;
  for (int i = static_cast<int>(blockIdx.x); i < map.n_tiles(); i += static_cast<int>(gridDim.x)) {
    const Tile t = map.tile(i);
    for (int s = 0; s < steps_of(t); ++s, ring.next()) {
      const int k = t.k_begin + s * kWgmmaColumns;
      barrier_wait(ring.empty(), ring.phase ^ 1);
      barrier_expect(ring.full(), Shape::kStageBytes);
      copy_box(ring.a(), maps.a, ring.full(), k, t.row, batched ? t.matrix : 0);
      copy_b(p, maps, ring, t, k);
    }
  }
}

// A warpgroup. A thread copies one chunk of 16 bytes of every 16th row.
template <class Shape>
__device__ inline void produce_gathered(const GemmParams& p, const TileMap& map, const Maps& maps,
                                        std::byte* stages, Ring<Shape> ring) {
  constexpr int kRows = Shape::kBytesA / kWgmmaRowBytes / 16;
  const int thread = static_cast<int>(threadIdx.x);
  const int first = thread / 8, chunk = thread % 8;
  const int place = first * kWgmmaRowBytes + (chunk ^ (first % 8)) * 16;
  Ring<Shape> late = ring;  // the stage to count as full next
  int n_open = 0;
  for (int i = static_cast<int>(blockIdx.x); i < map.n_tiles(); i += static_cast<int>(gridDim.x)) {
    const Tile t = map.tile(i);
    const uint16_t* rows[kRows];
    bool inside[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = t.row + first + 16 * r;
      inside[r] = row < t.row_end;
      rows[r] = static_cast<const uint16_t*>(p.a) + (inside[r] ? row_of_a(p, row) : 0) * p.lda +
                8 * chunk;
    }
    for (int s = 0; s < steps_of(t); ++s, ring.next()) {
      const int k = t.k_begin + s * kWgmmaColumns;
      barrier_wait(ring.empty(), ring.phase ^ 1);
      if (thread == 0) {
        barrier_expect(ring.full(), Shape::kBytesB);
        copy_b(p, maps, ring, t, k);
      }
      std::byte* stage = stages + ring.slot * Shape::kStageBytes + place;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        cp_async16(stage + 16 * r * kWgmmaRowBytes, rows[r] + k,
                   inside[r] && k + 8 * chunk < t.k_end);
      }
      cp_async_commit();
      if (n_open++ < Shape::kLag) continue;
      cp_async_wait<Shape::kLag>();
      fence_shared_products();
      barrier_arrive(late.full());
      late.next();
    }
  }
  cp_async_wait<0>();
  fence_shared_products();
  for (int s = 0; s < min(n_open, Shape::kLag); ++s, late.next()) barrier_arrive(late.full());
}

// Half of a thread's sums belong to one row of c, half to the row 8 below: `half` says which. Runs
// of 8 columns follow each other in c, fused from both halves of the sums.
template <int N>
__device__ inline void store_row(const GemmParams& p, const OutRow& out, int column, int half,
                                 const float (&sums)[N]) {
  const bool fused = p.b_up != nullptr;
  const bool whole = p.paired_stores && column + 2 * N - 6 <= p.n;  // the last begins 8 before
  if (whole && !fused && !out.half && out.residual == nullptr) {    // most results
    float* c = static_cast<float*>(out.c) + column;
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      *reinterpret_cast<float2*>(c + 8 * j) =
          make_float2(out.scale * sums[4 * j + 2 * half], out.scale * sums[4 * j + 2 * half + 1]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float v0 = out.scale * sums[4 * j + 2 * half];
    const float v1 = out.scale * sums[4 * j + 2 * half + 1];
    const float u0 = out.scale * sums[N / 2 + 4 * j + 2 * half];
    const float u1 = out.scale * sums[N / 2 + 4 * j + 2 * half + 1];
    if (fused) {
      store_pair(p, out, column + 8 * j, swiglu(v0, u0), swiglu(v1, u1));
    } else {
      store_pair(p, out, column + 8 * j, v0, v1);
      store_pair(p, out, column + N + 8 * j, u0, u1);
    }
  }
}

template <class Shape, int N>
__device__ inline void store_sums(const GemmParams& p, const Tile& t, int group,
                                  const float (&sums)[N]) {
  const int row =
      t.row + (Shape::kGroupsN == 1 ? group * 64 : 0) + warp_id() % 4 * 16 + lane_id() / 4;
  int column = t.column + 2 * (lane_id() % 4);
  if (Shape::kGroupsN == 2) column += group * (p.b_up != nullptr ? N : 2 * N);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= t.row_end) continue;
    store_row(p, out_row(p, t, row + 8 * half), column, half, sums);
  }
}

// Warpgroup `group` (0 or 1) of those that multiply.
template <class Element, class Shape>
__device__ inline void consume(const GemmParams& p, const TileMap& map, Ring<Shape> ring,
                               int group) {
  constexpr int kSums = Shape::kGroupColumns / 2;
  const int a_offset = Shape::kGroupsN == 1 ? group * 64 * kWgmmaRowBytes : 0;
  const int b_offset = Shape::kGroupsN == 1 ? 0 : group * Shape::kGroupColumns * kWgmmaRowBytes;
  for (int i = static_cast<int>(blockIdx.x); i < map.n_tiles(); i += static_cast<int>(gridDim.x)) {
    const Tile t = map.tile(i);
    const int n_steps = steps_of(t);
    float sums[kSums];
#pragma unroll
    for (int j = 0; j < kSums; ++j) sums[j] = 0;
    SharedAddress used{};  // barrier of the stage before
    for (int s = 0; s < n_steps; ++s, ring.next()) {
      barrier_wait(ring.full(), ring.phase);
      const SharedMatrix a = rows_of_boxes(ring.a() + a_offset);
      const SharedMatrix b = rows_of_boxes(ring.b() + b_offset);
      hold_sums(sums);
      warpgroup_fence();
#pragma unroll
      for (int k16 = 0; k16 < kWgmmaColumns / 16; ++k16) {
        multiply_rows<Element>(sums, advance(a, 32 * k16), advance(b, 32 * k16));
      }
      warpgroup_commit();
      warpgroup_wait<1>();
      if (s > 0 && lane_id() == 0) barrier_arrive(used);
      used = ring.empty();
    }
    warpgroup_wait<0>();
    hold_sums(sums);
    if (n_steps > 0 && lane_id() == 0) barrier_arrive(used);
    store_sums<Shape>(p, t, group, sums);
  }
}
#endif

template <class Element, int TileM, int TileN, bool Gathered>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    gemm_wgmma(GemmParams p, const __grid_constant__ TensorMap map_a,
               const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_up) {
#ifdef MLA_HAS_WARPGROUPS
  using Shape = WgmmaShape<TileM, TileN>;
  std::byte* smem = dynamic_smem();
  Ring<Shape> ring{shared_address(smem),
                   shared_address(smem) + Shape::kStages * Shape::kStageBytes};
  if (threadIdx.x == 0) {
    prefetch_map(&map_b);
    constexpr int kConsumerWarps = 8;
    for (int s = 0; s < Shape::kStages; ++s) {
      barrier_init(ring.barriers + 8 * s, Gathered ? 1 + kWarpgroup : 1);
      barrier_init(ring.barriers + 8 * (Shape::kStages + s), kConsumerWarps);
    }
    fence_barriers();
  }
  pdl_wait();
  int* starts =
      reinterpret_cast<int*>(smem + Shape::kStages * Shape::kStageBytes + Shape::kBarrierBytes);
  const TileMap map(p, TileM, TileN, starts);
  __syncthreads();
  const Maps maps{&map_a, &map_b, &map_up};
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if constexpr (Gathered) {
      produce_gathered<Shape>(p, map, maps, smem, ring);
    } else if (threadIdx.x == 0) {
      produce_boxes<Shape>(p, map, maps, ring);
    }
  } else {
    take_registers<kConsumerRegisters>();
    consume<Element, Shape>(p, map, ring, static_cast<int>(threadIdx.x) / kWarpgroup - 1);
  }
#else
  __trap();  // never launched: see has_wgmma
#endif
}

}  // namespace mla::cuda
