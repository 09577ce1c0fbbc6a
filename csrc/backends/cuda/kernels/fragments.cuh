// Packed and plain weights as fragments of m16n8k16 products: 16 rows by a unit of k.
//
// A warp copies a unit of its 16 rows, plane by plane, to shared memory 16 bytes at a time and
// reads it as 8 x 16-byte matrices: lane 4 g + t then holds word t of a 16-byte piece of rows g and
// g + 8, that is the weights 4 t .. 4 t + 3 (or two for each nibble) of one group, and so no two
// groups meet in a product. The order of k within a group is that of staged_rows.cuh.
//
// Integers become halves without a conversion: q in the lowest bits of a half is the subnormal
// number q * 2^-24, exact in the matrix unit and in the subtraction of an offset, and 2^24 goes
// with the result; bytes become 1024 + q, from which 1024 + offset is taken in one step. Scales
// stay float32 and meet the float32 sums of a group: no rounding but that of x to f16 is left.
//
// Instructions per weight and lane in the compiled loop for one tile of 8 tokens (sm_90a, all
// included but the step to another tile), beside those that a multiprocessor can issue, 4 a cycle,
// in the time in which its share of 4.3 TB/s brings a weight (18 bytes a cycle at 1.8 GHz):
//
//   Q4_0 2.7 / 4.0    Q4_1 2.4 / 4.4    Q5_0 4.2 / 4.9    Q5_1 3.9 / 5.3    Q8_0 3.3 / 7.6
//   Q4_K 2.6 / 4.0    Q5_K 3.6 / 4.9    Q6_K 4.4 / 5.8    Q2_K 3.2 / 2.3    Q3_K 5.3 / 3.1
//   IQ4_NL 4.6 / 4.0  IQ4_XS 5.4 / 3.8  F16 2.9 / 14
//
// Where the first is the larger, instructions and not bytes set the time.
#pragma once

#include <utility>

#include "backends/cuda/kernels/decode.cuh"
#include "backends/cuda/kernels/small_batch_job.cuh"

namespace mla::cuda {

// ---- copies -------------------------------------------------------------------------------------

// Elements of k per unit: a super-block or as many small blocks as fill 16 bytes of scales; less
// where that keeps a stage below 4 KiB.
template <Format F>
inline constexpr int kUnit = 256;
template <>
inline constexpr int kUnit<Format::Q8_0> = 128;
template <>
inline constexpr int kUnit<Format::F16> = 64;
template <>
inline constexpr int kUnit<Format::BF16> = 64;

template <Format F>
inline constexpr int kUnitBlockElems = 1;
#define MLA_FORMAT(name, gguf, elems, bytes) \
  template <>                                \
  inline constexpr int kUnitBlockElems<Format::name> = elems;
#include "quant/formats.def"

// A unit's bytes of one plane of one row. Fewer than 16 are copied with the 16 (32 where they may
// straddle) that they lie in.
template <Format F>
struct StageLayout {
  static constexpr bool kPlain = kUnitBlockElems<F> == 1;

  static constexpr int bytes(int i) {
    if constexpr (kPlain) {
      return i == 0 ? 2 * kUnit<F> : 0;
    } else {
      constexpr std::array<Field, kMaxPlanes> fields = PackedPlanes<F>::fields;
      return fields[static_cast<size_t>(i)].bytes * kUnit<F> / kUnitBlockElems<F>;
    }
  }
  static constexpr int pieces(int i) {
    const int n = bytes(i);
    return n % 16 == 0 ? n / 16 : (16 % n == 0 ? 1 : 2);
  }
  static constexpr int at(int i) {  // in a staged row
    int sum = 0;
    for (int j = 0; j < i; ++j) sum += 16 * pieces(j);
    return sum;
  }
  // An odd number of pieces: eight rows of a matrix then lie in all banks. Plain weights are read
  // in 64 bytes of two rows at a time, and want an odd multiple of that.
  static constexpr int kPitch = kPlain ? 192 : 16 * (at(kMaxPlanes) / 16 | 1);
  static constexpr int kBytes = kTileRows * kPitch;
};

// Where the planes of a row begin, and how long they are.
struct Planes {
  int at[kMaxPlanes + 1];
};
template <Format F>
__device__ __forceinline__ Planes planes_of(int k) {
  Planes planes;
#pragma unroll
  for (int i = 0; i <= kMaxPlanes; ++i) {
    if constexpr (StageLayout<F>::kPlain) {
      planes.at[i] = i == 0 ? 0 : 2 * k;
    } else {
      planes.at[i] = static_cast<int>(plane_offset<F>(i, k / kUnitBlockElems<F>));
    }
  }
  return planes;
}

template <Format F, int I>
__device__ __forceinline__ void copy_plane(std::byte* stage, const std::byte* w, int row_stride,
                                           int n_rows, int unit, const Planes& planes) {
  using Layout = StageLayout<F>;
  constexpr int n = Layout::pieces(I), n_copies = kTileRows * n;
  if constexpr (Layout::bytes(I) > 0) {
    const int first = Layout::bytes(I) * unit / 16 * 16;
    const int length = planes.at[I + 1] - planes.at[I];
#pragma unroll
    for (int i = 0; i < n_copies; i += kWarpThreads) {
      const int index = i + lane_id(), row = index / n, piece = index % n;
      if (n_copies % kWarpThreads != 0 && index >= n_copies) break;
      const int at = first + 16 * piece;
      const bool valid = row < n_rows && at < length;
      const std::byte* from = w + (row * row_stride + planes.at[I] + at);
      cp_async16(stage + row * Layout::kPitch + Layout::at(I) + 16 * piece, from, valid);
    }
  }
}

// Unit `unit` of rows w, w + row_stride, ..; zeros for rows from n_rows on and behind the end of k.
template <Format F>
__device__ __forceinline__ void copy_unit(std::byte* stage, const std::byte* w, int row_stride,
                                          int n_rows, int unit, const Planes& planes) {
  copy_plane<F, 0>(stage, w, row_stride, n_rows, unit, planes);
  copy_plane<F, 1>(stage, w, row_stride, n_rows, unit, planes);
  copy_plane<F, 2>(stage, w, row_stride, n_rows, unit, planes);
  copy_plane<F, 3>(stage, w, row_stride, n_rows, unit, planes);
}

// ---- parts of fragments -------------------------------------------------------------------------

// The fragments of two groups of 32: a[0], a[1] of the first, a[2], a[3] of the second. Of each,
// registers h and 2 + h belong to row g + 8 h. scale[group][half][h]; half 1 only where groups of
// 16 have their own.
struct PairFragments {
  uint32_t a[4][4];
  float scale[2][2][2];
};

namespace fragments {

// Every second half-byte or byte of a word, as halves: bytes 0 and 2, or 1 and 3 after >> 8.
inline constexpr uint32_t kLow4 = 0x000f000fu, kHigh4 = 0x00f000f0u, kThousand = 0x64006400u;
inline constexpr float kSubnormal = 16777216.0f;  // 2^24: what subnormal halves are short of

// Both halves q * 2^-24 -> (q - offset) * 2^-24.
template <int offset>
__device__ __forceinline__ uint32_t minus_subnormal(uint32_t halves) {
  const uint32_t bits = (0x8000u + offset) * 0x10001u;
  const __half2 v =
      __hadd2(*reinterpret_cast<const __half2*>(&halves), *reinterpret_cast<const __half2*>(&bits));
  return *reinterpret_cast<const uint32_t*>(&v);
}

// 1024 + q -> q - offset, both halves.
template <int offset>
__device__ __forceinline__ uint32_t minus(uint32_t halves) {
  const uint32_t bits = (0xe400u + offset) * 0x10001u;  // -(1024 + offset)
  const __half2 v =
      __hadd2(*reinterpret_cast<const __half2*>(&halves), *reinterpret_cast<const __half2*>(&bits));
  return *reinterpret_cast<const uint32_t*>(&v);
}

__device__ __forceinline__ float2 float_pair(uint32_t halves) {
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}
template <int i>
__device__ __forceinline__ float byte_float(uint32_t word) {
  return static_cast<float>((word >> (8 * i)) & 255u);
}
template <int i>
__device__ __forceinline__ float signed_byte_float(uint32_t word) {
  return static_cast<float>(static_cast<int8_t>((word >> (8 * i)) & 255u));
}

// This lane's row g + 8 h of a staged tile.
template <Format F>
__device__ __forceinline__ const std::byte* lane_row(const std::byte* stage, int h) {
  return stage + (lane_id() / 4 + 8 * h) * StageLayout<F>::kPitch;
}

// r[h], r[2 + h]: word t of the pieces at byte `first` and `second` of row g + 8 h.
template <Format F>
__device__ __forceinline__ void load_pieces(uint32_t (&r)[4], const std::byte* stage, int first,
                                            int second) {
  const int lane = lane_id();
  ldmatrix_x4(r, stage + (lane % 16) * StageLayout<F>::kPitch + (lane < 16 ? first : second));
}

__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t b) {
  return (a & mask) | b;
}

// Bits 0..3 of h to bit 4 of halves: m holds b0, b2 and m >> 1 holds b1, b3 under this mask.
inline constexpr uint32_t kFifth = 0x00100010u;
__device__ __forceinline__ uint32_t spread_fifth(uint32_t h) { return (h & 15u) * 0x40010u; }

}  // namespace fragments

// ---- what a format gives ------------------------------------------------------------------------

// Fragments<F>(stage, unit) holds what a lane keeps of a staged unit. pair<i>() gives groups
// first(i) and second(i) of the unit, with kScales scales each (0: plain numbers). Where there are
// minima, kMinima products of minimum_fragment<j>() with the staged sums of x, each times
// minimum_scale(h), are what they add. Sums are kResultScale too small.
template <Format F>
struct Fragments;

struct NeighbourGroups {
  static constexpr int first(int i) { return 2 * i; }
  static constexpr int second(int i) { return 2 * i + 1; }
};

}  // namespace mla::cuda
