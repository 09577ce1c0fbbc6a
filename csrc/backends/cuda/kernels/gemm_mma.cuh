// c = a b^T on mma.sync, for every device: dense and grouped, see gemm.h.
//
// A block of 8 warps (2 along m, 4 along n) computes tiles of TileM x TileN, one after another;
// a step of the k loop takes 32 columns. Three or four stages of
//
//   [TileM rows of a, 64 bytes each][TileN rows of b, 64 bytes each]
//
// lie in shared memory: all but one are on their way while that one is multiplied. Two rows share
// the 128 bytes of all banks; the 16-byte chunk c of row r lies at place c ^ (r / 2 % 4), so that
// the eight rows of an ldmatrix meet eight different bank groups. Fused, rows of b alternate in
// eights: 8 of the gate, the 8 of the same columns of up, so that one thread holds both.
//
// Rows beyond the matrix and columns beyond k are zeros. Error: that of float32 sums of exact
// products, k * 2^-24 of the sum of magnitudes.
#pragma once

#include <type_traits>

#include "backends/cuda/kernels/gemm_tiles.cuh"

namespace mla::cuda {

inline constexpr int kMmaThreads = 256;
inline constexpr int kMmaStep = 32;  // columns of k
inline constexpr int kMmaRowBytes = 2 * kMmaStep;

constexpr int mma_stage_bytes(int tile_m, int tile_n) { return (tile_m + tile_n) * kMmaRowBytes; }
// As many as leave room for two blocks where a multiprocessor has 128 KB, for one on sm_75 (64 KB).
constexpr int mma_n_stages(int tile_m, int tile_n) {
  return mma_stage_bytes(tile_m, tile_n) > 12 * 1024 ? 3 : 4;
}
constexpr int mma_smem_bytes(int tile_m, int tile_n) {
  return mma_stage_bytes(tile_m, tile_n) * mma_n_stages(tile_m, tile_n) + TileMap::kSharedBytes;
}

__device__ inline int mma_chunk(int row, int chunk) {
  return row * kMmaRowBytes + ((chunk ^ (row / 2 % 4)) * 16);
}

// The rows of a tile that one thread copies, one chunk of 16 bytes each per step.
template <int TileM, int TileN>
struct MmaCopy {
  static constexpr int kRowsAtOnce = kMmaThreads / 4;
  static constexpr int kA = TileM / kRowsAtOnce, kB = TileN / kRowsAtOnce;

  const uint16_t* a[kA];
  const uint16_t* b[kB];
  uint32_t valid = 0;  // bit i: row i of a; bit 16 + i: row i of b
  int row, chunk;

  __device__ MmaCopy(const GemmParams& p, const Tile& t)
      : row(static_cast<int>(threadIdx.x) / 4), chunk(static_cast<int>(threadIdx.x) % 4) {
    const uint16_t* a_base = static_cast<const uint16_t*>(p.a);
    if (p.offsets == nullptr) a_base += t.matrix * p.batch_a;
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      const int at = t.row + row + i * kRowsAtOnce;
      const bool inside = at < t.row_end;
      a[i] = a_base + (inside ? row_of_a(p, at) : 0) * p.lda + chunk * 8;
      valid |= (inside ? 1u : 0u) << i;
    }
#pragma unroll
    for (int i = 0; i < kB; ++i) {
      int column = row + i * kRowsAtOnce;
      const bool up = p.b_up != nullptr && column / 8 % 2 == 1;
      if (p.b_up != nullptr) column = column / 16 * 8 + column % 8;
      const bool inside = t.column + column < p.n;
      const uint16_t* base = static_cast<const uint16_t*>(up ? p.b_up : p.b);
      b[i] = base + t.matrix * p.batch_b + (inside ? t.column + column : 0) * p.ldb + chunk * 8;
      valid |= (inside ? 1u : 0u) << (16 + i);
    }
  }

  // Columns from k0 on into a stage.
  __device__ void start(std::byte* stage, int k0, int k_end) const {
    const bool inside = k0 + chunk * 8 < k_end;
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      cp_async16(stage + mma_chunk(row + i * kRowsAtOnce, chunk), a[i] + k0,
                 inside && (valid >> i & 1u) != 0);
    }
    stage += TileM * kMmaRowBytes;
#pragma unroll
    for (int i = 0; i < kB; ++i) {
      cp_async16(stage + mma_chunk(row + i * kRowsAtOnce, chunk), b[i] + k0,
                 inside && (valid >> (16 + i) & 1u) != 0);
    }
  }
};

template <class Element, int TileM, int TileN>
struct MmaWarp {
  static constexpr int kM = TileM / 2 / 16, kN = TileN / 4 / 8;  // products of 16 x 8
  float sum[kM][kN][4] = {};

  __device__ static int row0() { return warp_id() / 4 * (TileM / 2); }
  __device__ static int column0() { return warp_id() % 4 * (TileN / 4); }

  __device__ void step(const std::byte* stage) {
    const std::byte* b_stage = stage + TileM * kMmaRowBytes;
    const int lane = lane_id();
#pragma unroll
    for (int k16 = 0; k16 < kMmaStep / 16; ++k16) {
      uint32_t a[kM][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        ldmatrix_x4(a[i], stage + mma_chunk(row0() + i * 16 + lane % 16, 2 * k16 + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        uint32_t b[4];
        const int row = column0() + j * 8 + lane / 16 * 8 + lane % 8;
        ldmatrix_x4(b, b_stage + mma_chunk(row, 2 * k16 + lane / 8 % 2));
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          multiply(sum[i][j], a[i], left);
          multiply(sum[i][j + 1], a[i], right);
        }
      }
    }
  }

  __device__ void store(const GemmParams& p, const Tile& t) const {
    const bool fused = p.b_up != nullptr;
    const int column = t.column + column0() / (fused ? 2 : 1) + 2 * (lane_id() % 4);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = t.row + row0() + i * 16 + half * 8 + lane_id() / 4;
        if (row >= t.row_end) continue;
        const OutRow out = out_row(p, t, row);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const float v0 = out.scale * sum[i][j][2 * half];
          const float v1 = out.scale * sum[i][j][2 * half + 1];
          if (!fused) {
            store_pair(p, out, column + 8 * j, v0, v1);
          } else if (j % 2 == 0) {
            store_pair(p, out, column + 4 * j, swiglu(v0, out.scale * sum[i][j + 1][2 * half]),
                       swiglu(v1, out.scale * sum[i][j + 1][2 * half + 1]));
          }
        }
      }
    }
  }

 private:
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<Element, __half>) {
      mma_f16(d, a, b);
    } else {
      mma_bf16(d, a, b);
    }
  }
};

template <class Element, int TileM, int TileN>
__global__ void __launch_bounds__(kMmaThreads, 2) gemm_mma(GemmParams p) {
  constexpr int kStages = mma_n_stages(TileM, TileN);
  constexpr int kBytes = mma_stage_bytes(TileM, TileN);
  pdl_wait();
  std::byte* smem = dynamic_smem();
  const TileMap map(p, TileM, TileN, reinterpret_cast<int*>(smem + kStages * kBytes));
  for (int index = static_cast<int>(blockIdx.x); index < map.n_tiles();
       index += static_cast<int>(gridDim.x)) {
    const Tile tile = map.tile(index);
    const MmaCopy<TileM, TileN> copy(p, tile);
    const int n_steps = (tile.k_end - tile.k_begin + kMmaStep - 1) / kMmaStep;
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < n_steps) copy.start(smem + s * kBytes, tile.k_begin + s * kMmaStep, tile.k_end);
      cp_async_commit();
    }
    MmaWarp<Element, TileM, TileN> warp;
    int slot = 0;
    for (int s = 0; s < n_steps; ++s) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // also: all warps have left the slot that is filled next
      const int next = s + kStages - 1;
      const int next_slot = slot == 0 ? kStages - 1 : slot - 1;
      if (next < n_steps) {
        copy.start(smem + next_slot * kBytes, tile.k_begin + next * kMmaStep, tile.k_end);
      }
      cp_async_commit();
      warp.step(smem + slot * kBytes);
      slot = slot + 1 == kStages ? 0 : slot + 1;
    }
    warp.store(p, tile);
    __syncthreads();  // the next tile's copies begin
  }
}

// Adds the parts of k: one thread per element of c, neighbours along n.
__global__ void __launch_bounds__(kMmaThreads) gemm_add_parts(GemmParams p) {
  pdl_wait();
  const int64_t at = int64_t{blockIdx.x} * kMmaThreads + threadIdx.x;
  const int64_t per_part = int64_t{p.n_batch} * p.m * p.n;
  if (at >= per_part) return;
  const int column = static_cast<int>(at % p.n);
  const int row = static_cast<int>(at / p.n % p.m);
  if (p.m_limit != nullptr && row >= *p.m_limit) return;
  float sum = 0;
  for (int s = 0; s < p.n_split; ++s) sum += p.partial[s * per_part + at];
  Tile tile = {};
  tile.matrix = static_cast<int>(at / p.n / p.m);
  p.n_split = 1;
  const OutRow out = out_row(p, tile, row);
  store_one(out, column, out.scale * sum);
}

}  // namespace mla::cuda
