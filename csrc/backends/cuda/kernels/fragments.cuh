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
// stay float32 and meet the float32 sums of a group: no rounding but that of x to f16 is left. With
// many columns they meet the weights instead, see small_batch.cuh.
//
// Instructions per weight and lane in the compiled loop over units, for one tile of 8 columns and
// (for eight), beside those that a multiprocessor can issue, 4 a cycle, in the time in which its
// share of 4.3 TB/s brings a weight (18 bytes a cycle at 1.8 GHz). Copies and the rest of a step
// come to 0.7 more; half of all are for the logic unit, which takes two cycles for each.
//
//   Q4_0 1.5 (4.3) / 4.0    Q4_1 1.5 (4.2) / 4.4    Q5_0 3.0 (5.9) / 4.9    Q5_1 3.1 (5.8) / 5.3
//   Q8_0 2.1 (3.8) / 7.6    Q4_K 1.9 (4.8) / 4.0    Q5_K 2.9 (5.8) / 4.9    Q6_K 3.6 (6.0) / 5.8
//   Q2_K 2.5 (5.4) / 2.3    Q3_K 4.7 (7.0) / 3.1    IQ4_NL 4.1 (5.8) / 4.0  IQ4_XS 4.9 (6.6) / 3.8
//   F16  1.1 (4.5) / 14
//
// Where the first is the larger, instructions and not bytes set the time.
#pragma once

#include <utility>

#include "backends/cuda/kernels/decode.cuh"
#include "backends/cuda/packed.h"
#include "backends/cuda/row_layout.h"

namespace mla::cuda {

inline constexpr int kTileRows = 16;  // of w, that a warp takes at a time

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

// The rows of w that a warp takes at a time: two runs of eight that follow each other, or eight of
// gate and of up. Those from n_low and n_high on are zeros.
struct TileRows {
  const std::byte *low, *high;
  int n_low, n_high;
  int stride;
  __device__ __forceinline__ const std::byte* row(int i) const {
    return (i < 8 ? low : high) + i % 8 * stride;
  }
  __device__ __forceinline__ bool has(int i) const { return i % 8 < (i < 8 ? n_low : n_high); }
  __device__ __forceinline__ bool whole() const { return min(n_low, n_high) >= 8; }
};

// Where planes begin and end.
using PlaneEnds = int[kMaxPlanes + 1];

// A plane of n_units units that are there as a whole, kBytes apart in the stage. With few
// addresses: what differs by a constant is the instruction's.
template <Format F, int I, int n_units>
__device__ __forceinline__ void copy_whole_plane(std::byte* stage, const TileRows& rows, int unit,
                                                 const PlaneEnds& planes) {
  using Layout = StageLayout<F>;
  constexpr int n = Layout::pieces(I), bytes = Layout::bytes(I);
  if constexpr (bytes > 0) {
    constexpr bool kInTurns = n >= 4 && kWarpThreads % n == 0;  // whole eights of rows
    constexpr int kRows = kInTurns ? kWarpThreads / n : 0;
    const int lane_row = lane_id() / n, piece = 16 * (lane_id() % n);
    std::byte* to = stage + (lane_row * Layout::kPitch + Layout::at(I) + piece);
    const int at = planes[I] + lane_row * rows.stride + piece + bytes * unit / 16 * 16;
    if constexpr (kInTurns) {
#pragma unroll
      for (int i = 0; i < 8; i += kRows) {
        const std::byte* low = rows.low + (at + i * rows.stride);
        const std::byte* high = rows.high + (at + i * rows.stride);
#pragma unroll
        for (int u = 0; u < n_units; ++u) {
          static_assert(n_units == 1 || bytes % 16 == 0 || !kInTurns);
          cp_async16(to + (u * Layout::kBytes + i * Layout::kPitch), low + u * bytes);
          cp_async16(to + (u * Layout::kBytes + (i + 8) * Layout::kPitch), high + u * bytes);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTileRows * n; i += kWarpThreads) {
        const int index = i + lane_id(), row = index / n;
        if (kTileRows * n % kWarpThreads != 0 && index >= kTileRows * n) break;
        const std::byte* from = rows.row(row) + (planes[I] + 16 * (index % n));
#pragma unroll
        for (int u = 0; u < n_units; ++u) {
          const int first = bytes * (unit + u) / 16 * 16;
          cp_async16(stage + (u * Layout::kBytes + row * Layout::kPitch + Layout::at(I) +
                              16 * (index % n)),
                     from + first);
        }
      }
    }
  }
}

// Zeros for rows that are not there and behind the end of k.
template <Format F, int I>
__device__ __forceinline__ void copy_plane(std::byte* stage, const TileRows& rows, int unit,
                                           const PlaneEnds& planes) {
  using Layout = StageLayout<F>;
  constexpr int n = Layout::pieces(I);
  if constexpr (Layout::bytes(I) > 0) {
    const int first = planes[I] + Layout::bytes(I) * unit / 16 * 16;
#pragma unroll 1
    for (int index = lane_id(); index < kTileRows * n; index += kWarpThreads) {
      const int row = index / n, at = first + 16 * (index % n);
      cp_async16(stage + row * Layout::kPitch + (Layout::at(I) + at - first), rows.row(row) + at,
                 rows.has(row) && at < planes[I + 1]);
    }
  }
}

// Units of 16 rows of w, kBytes apart.
template <Format F, int n_units>
__device__ __forceinline__ void copy_units(std::byte* stage, const TileRows& rows, int unit,
                                           int unit_end, const PlaneEnds& planes) {
  constexpr int bytes = StageLayout<F>::bytes(0);
  if (rows.whole() && bytes * (unit + n_units) <= planes[1] - planes[0]) {
    copy_whole_plane<F, 0, n_units>(stage, rows, unit, planes);
    copy_whole_plane<F, 1, n_units>(stage, rows, unit, planes);
    copy_whole_plane<F, 2, n_units>(stage, rows, unit, planes);
    copy_whole_plane<F, 3, n_units>(stage, rows, unit, planes);
    return;
  }
#pragma unroll 1
  for (int end = min(unit + n_units, unit_end); unit < end; ++unit) {
    copy_plane<F, 0>(stage, rows, unit, planes);
    copy_plane<F, 1>(stage, rows, unit, planes);
    copy_plane<F, 2>(stage, rows, unit, planes);
    copy_plane<F, 3>(stage, rows, unit, planes);
    stage += StageLayout<F>::kBytes;
  }
}

// Asks for n_units from `unit` on to come into L2.
template <Format F>
__device__ __forceinline__ void fetch_units(const TileRows& rows, int unit, int n_units,
                                            const PlaneEnds& planes) {
  constexpr int kLine = 128;
  const int row = lane_id() % kTileRows;
  if (!rows.has(row)) return;
#pragma unroll
  for (int i = 0; i < kMaxPlanes; ++i) {
    const int bytes = StageLayout<F>::bytes(i);
    if (bytes == 0) break;
    const int begin = planes[i] + bytes * unit / kLine * kLine;
    const int end = min(planes[i] + bytes * (unit + n_units), planes[i + 1]);
#pragma unroll 1
    for (int at = begin + lane_id() / kTileRows * kLine; at < end; at += 2 * kLine) {
      prefetch_l2(rows.row(row) + at);
    }
  }
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

// What takes bits 0 and 2, or 1 and 3, of four to bit 4 of the halves of a word: others stray, but
// not there.
inline constexpr uint32_t kFifth = 0x00100010u;
inline constexpr uint32_t kEvenFifths = 0x00040010u, kOddFifths = 0x00020008u;

__device__ __forceinline__ uint32_t times(uint32_t halves, uint32_t factors) {
  const __half2 v = __hmul2(*reinterpret_cast<const __half2*>(&halves),
                            *reinterpret_cast<const __half2*>(&factors));
  return *reinterpret_cast<const uint32_t*>(&v);
}

// The numbers with their scales, in f16. Subnormal ones are made normal first: by 2^15, which
// leaves 2^9 to the scale, so that neither it nor a weight leaves the range of f16.
template <int n_scales, bool subnormal>
__device__ __forceinline__ void apply_scales(PairFragments& f) {
  constexpr uint32_t kUp = 0x78007800u;  // 2^15, twice
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float scale = f.scale[k / 2][k % 2 * (n_scales - 1)][h] * (subnormal ? 512.0f : 1.0f);
      const __half2 both = __float2half2_rn(scale);
      const uint32_t factors = *reinterpret_cast<const uint32_t*>(&both);
      f.a[k][h] = times(subnormal ? times(f.a[k][h], kUp) : f.a[k][h], factors);
      f.a[k][2 + h] = times(subnormal ? times(f.a[k][2 + h], kUp) : f.a[k][2 + h], factors);
    }
  }
}

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
