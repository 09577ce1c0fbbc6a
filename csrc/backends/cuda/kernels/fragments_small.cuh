// Fragments of the formats with small blocks, and of the two that index levels: see fragments.cuh
// for the layout, the arithmetic and its cost.
#pragma once

#include "backends/cuda/kernels/fragments.cuh"

namespace mla::cuda {

// ---- formats ------------------------------------------------------------------------------------

// 4-bit blocks, with a fifth bit, with minima or an offset, which is the minimum -offset * d.
template <Format F, bool fifth, bool min>
struct SmallBlocks : NeighbourGroups {
  static constexpr int kScales = 1;
  static constexpr int kMinima = 1;
  static constexpr RowLayout kRows = RowLayout::packed_halves;
  static constexpr int kHead = StageLayout<F>::at(fifth ? 2 : 1);
  static constexpr float kOffset = fifth ? 16.0f : 8.0f;
  static constexpr float kResultScale = fragments::kSubnormal;

  const std::byte* stage;
  __device__ __forceinline__ SmallBlocks(const std::byte* s, int) : stage(s) {}

  template <int i>
  __device__ __forceinline__ void pair(PairFragments& f) const {
    using namespace fragments;
    uint32_t r[4];
    load_pieces<F>(r, stage, 32 * i, 32 * i + 16);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::byte* row = lane_row<F>(stage, h);
      scales<i>(row, f, h);
      uint2 qh = {0, 0};
      if constexpr (fifth) {
        qh = *reinterpret_cast<const uint2*>(row + StageLayout<F>::at(1) + 8 * i);
      }
      quarters(f.a[0], f.a[1], h, r[h], qh.x);
      quarters(f.a[2], f.a[3], h, r[2 + h], qh.y);
    }
  }

  template <int>
  __device__ __forceinline__ void minimum_fragment(uint32_t (&a)[4]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::byte* head = fragments::lane_row<F>(stage, h) + kHead;
      if constexpr (min) {
        const uint2 dm = *reinterpret_cast<const uint2*>(head + 8 * (lane_id() % 4));
        a[h] = a[2 + h] = __byte_perm(dm.x, dm.y, 0x7632);
      } else {
        a[h] = a[2 + h] = word_at(head + 4 * (lane_id() % 4));
      }
    }
  }
  __device__ __forceinline__ float minimum_scale(int) const {
    return (min ? 1.0f : -kOffset) / fragments::kSubnormal;
  }

 private:
  template <int i>
  __device__ __forceinline__ void scales(const std::byte* row, PairFragments& f, int h) const {
    using namespace fragments;
    if constexpr (min) {
      const uint2 dm = *reinterpret_cast<const uint2*>(row + kHead + 8 * i);
      f.scale[0][0][h] = float_pair(dm.x).x;
      f.scale[1][0][h] = float_pair(dm.y).x;
    } else {
      const float2 d = float_pair(word_at(row + kHead + 4 * i));
      f.scale[0][0][h] = d.x;
      f.scale[1][0][h] = d.y;
    }
  }
  // Low nibbles are elements below 16 of the group, high ones those above: they stay 16 times too
  // large, and their x is divided by that.
  __device__ __forceinline__ void quarters(uint32_t (&low)[4], uint32_t (&high)[4], int h,
                                           uint32_t w, uint32_t qh) const {
    using namespace fragments;
    low[h] = w & kLow4;
    low[2 + h] = (w >> 8) & kLow4;
    high[h] = w & kHigh4;
    high[2 + h] = (w >> 8) & kHigh4;
    if constexpr (fifth) {  // multiplications, where shifts would keep the logic unit busy
      const uint32_t bits = qh >> (4 * (lane_id() % 4));
      const uint32_t lower = bits & 15u, upper = (bits >> 16) & 15u;
      low[h] |= lower * kEvenFifths & kFifth;
      low[2 + h] |= lower * kOddFifths & kFifth;
      high[h] |= upper * (16 * kEvenFifths) & (16 * kFifth);
      high[2 + h] |= upper * (16 * kOddFifths) & (16 * kFifth);
    }
  }
};
template <>
struct Fragments<Format::Q4_0> : SmallBlocks<Format::Q4_0, false, false> {
  using SmallBlocks::SmallBlocks;
};
template <>
struct Fragments<Format::Q4_1> : SmallBlocks<Format::Q4_1, false, true> {
  using SmallBlocks::SmallBlocks;
};
template <>
struct Fragments<Format::Q5_0> : SmallBlocks<Format::Q5_0, true, false> {
  using SmallBlocks::SmallBlocks;
};
template <>
struct Fragments<Format::Q5_1> : SmallBlocks<Format::Q5_1, true, true> {
  using SmallBlocks::SmallBlocks;
};

template <>
struct Fragments<Format::Q8_0> : NeighbourGroups {
  static constexpr float kResultScale = 1.0f;
  static constexpr Format F = Format::Q8_0;
  static constexpr int kScales = 1;
  static constexpr int kMinima = 0;
  static constexpr RowLayout kRows = RowLayout::packed;

  const std::byte* stage;
  int head;  // of this unit's four scales
  __device__ __forceinline__ Fragments(const std::byte* s, int unit)
      : stage(s), head(StageLayout<F>::at(1) + 8 * (unit & 1)) {}

  template <int i>
  __device__ __forceinline__ void pair(PairFragments& f) const {
    using namespace fragments;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      uint32_t r[4];
      load_pieces<F>(r, stage, 64 * i + 32 * group, 64 * i + 32 * group + 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // piece j / 2, row half j % 2
        const uint32_t w = r[j] ^ 0x80808080u;
        f.a[2 * group + j / 2][j % 2] = minus<128>(__byte_perm(w, kThousand, 0x5250));
        f.a[2 * group + j / 2][2 + j % 2] = minus<128>(__byte_perm(w, kThousand, 0x5351));
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 d = float_pair(word_at(lane_row<F>(stage, h) + head + 4 * i));
      f.scale[0][0][h] = d.x;
      f.scale[1][0][h] = d.y;
    }
  }
};

// Nibbles that index sixteen levels; the scales differ.
namespace fragments {

// Levels + 128 of the four nibbles in the low half of `nibbles`, as bytes.
__device__ __forceinline__ uint32_t four_levels(uint32_t nibbles) {
  const uint32_t index = nibbles & 0x7777u;
  const uint32_t low = __byte_perm(iq4_level_word(0), iq4_level_word(4), index);
  const uint32_t high = __byte_perm(iq4_level_word(8), iq4_level_word(12), index);
  return __byte_perm(low, high, 0x3210u | ((nibbles & 0x8888u) >> 1));
}

__device__ __forceinline__ void level_quarters(uint32_t (&low)[4], uint32_t (&high)[4], int h,
                                               uint32_t w) {
  const uint32_t even_first = __byte_perm(w, 0u, 0x3120);
  const uint32_t even = four_levels(even_first & 0xffffu), odd = four_levels(even_first >> 16);
  low[h] = minus<128>(__byte_perm(even, kThousand, 0x5250));
  high[h] = minus<128>(__byte_perm(even, kThousand, 0x5351));
  low[2 + h] = minus<128>(__byte_perm(odd, kThousand, 0x5250));
  high[2 + h] = minus<128>(__byte_perm(odd, kThousand, 0x5351));
}

}  // namespace fragments

template <Format F, class Scale>
__device__ __forceinline__ void level_pair(const std::byte* stage, int i, PairFragments& f,
                                           const Scale& scale) {
  using namespace fragments;
  uint32_t r[4];
  load_pieces<F>(r, stage, 32 * i, 32 * i + 16);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    level_quarters(f.a[0], f.a[1], h, r[h]);
    level_quarters(f.a[2], f.a[3], h, r[2 + h]);
    f.scale[0][0][h] = scale(h, 2 * i);
    f.scale[1][0][h] = scale(h, 2 * i + 1);
  }
}

template <>
struct Fragments<Format::IQ4_NL> : NeighbourGroups {
  static constexpr float kResultScale = 1.0f;
  static constexpr Format F = Format::IQ4_NL;
  static constexpr int kScales = 1;
  static constexpr int kMinima = 0;
  static constexpr RowLayout kRows = RowLayout::packed;

  const std::byte* stage;
  __device__ __forceinline__ Fragments(const std::byte* s, int) : stage(s) {}
  template <int i>
  __device__ __forceinline__ void pair(PairFragments& f) const {
    level_pair<F>(stage, i, f, [&](int h, int group) {
      return half_at(fragments::lane_row<F>(stage, h) + StageLayout<F>::at(1) + 2 * group);
    });
  }
};

template <>
struct Fragments<Format::IQ4_XS> : NeighbourGroups {
  static constexpr float kResultScale = 1.0f;
  static constexpr Format F = Format::IQ4_XS;
  static constexpr int kScales = 1;
  static constexpr int kMinima = 0;
  static constexpr RowLayout kRows = RowLayout::packed;

  const std::byte* stage;
  uint2 head[2];  // {d, scales_h}, scales_l
  __device__ __forceinline__ Fragments(const std::byte* s, int unit) : stage(s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      head[h] = *reinterpret_cast<const uint2*>(fragments::lane_row<F>(s, h) +
                                                StageLayout<F>::at(1) + 8 * (unit & 1));
    }
  }
  template <int i>
  __device__ __forceinline__ void pair(PairFragments& f) const {
    level_pair<F>(stage, i, f, [&](int h, int group) {
      const uint32_t low = (head[h].y >> (4 * group)) & 15u;
      const uint32_t high = (head[h].x >> (16 + 2 * group)) & 3u;
      const int scale = static_cast<int>(low | (high << 4)) - 32;
      return fragments::float_pair(head[h].x).x * static_cast<float>(scale);
    });
  }
};

}  // namespace mla::cuda
