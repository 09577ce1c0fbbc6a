// Fragments of the formats with super-blocks, one to a unit, and of plain 16-bit weights: see
// fragments.cuh for the layout, the arithmetic and its cost.
#pragma once

#include "backends/cuda/kernels/fragments.cuh"

namespace mla::cuda {

// Q4_K and Q5_K: groups 2 i and 2 i + 1 are the low and high nibbles of the same bytes. A high
// nibble stays 16 times too large, and its scale is divided by that.
template <Format F, bool fifth>
struct ScaledMinima : NeighbourGroups {
  static constexpr float kResultScale = fragments::kSubnormal;
  static constexpr int kScales = 1;
  static constexpr int kMinima = 1;
  static constexpr RowLayout kRows = RowLayout::packed_sums32;

  const std::byte* stage;
  uint32_t scale[2][2];  // bytes: six bits each of groups 0..3, 4..7
  uint32_t minimum[2];   // of groups 2t and 2t + 1, subnormal halves
  float d[2], dmin[2];

  __device__ __forceinline__ ScaledMinima(const std::byte* s, int) : stage(s) {
    constexpr uint32_t kSix = 0x3f3f3f3fu, kFour = 0x0f0f0f0fu, kTop = 0x30303030u;
    const int t = lane_id() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 head = *reinterpret_cast<const uint4*>(fragments::lane_row<F>(s, h) +
                                                         StageLayout<F>::at(fifth ? 2 : 1));
      scale[h][0] = head.y & kSix;
      scale[h][1] = (head.w & kFour) | ((head.y >> 2) & kTop);
      const uint32_t low = head.z & kSix, high = ((head.w >> 4) & kFour) | ((head.z >> 2) & kTop);
      minimum[h] = __byte_perm(t < 2 ? low : high, 0u, (t & 1) != 0 ? 0x4342 : 0x4140);
      const float2 both = fragments::float_pair(head.x);
      d[h] = both.x;
      dmin[h] = both.y;
    }
  }

  template <int i>
  __device__ __forceinline__ void pair(PairFragments& f) const {
    using namespace fragments;
    uint32_t r[4], q[4] = {};
    load_pieces<F>(r, stage, 32 * i, 32 * i + 16);
    if constexpr (fifth)
      load_pieces<F>(q, stage, StageLayout<F>::at(1), StageLayout<F>::at(1) + 16);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint32_t w = r[2 * p + h], v = q[2 * p + h];
        f.a[p][h] = (w & kLow4) | fifth_bits<2 * i, 0, 4>(v);
        f.a[p][2 + h] = ((w >> 8) & kLow4) | fifth_bits<2 * i, 8, 4>(v);
        f.a[2 + p][h] = (w & kHigh4) | fifth_bits<2 * i + 1, 0, 8>(v);
        f.a[2 + p][2 + h] = ((w >> 8) & kHigh4) | fifth_bits<2 * i + 1, 8, 8>(v);
      }
      f.scale[0][0][h] = d[h] * byte_float<2 * i % 4>(scale[h][i / 2]);
      f.scale[1][0][h] = d[h] * 0.0625f * byte_float<2 * i % 4 + 1>(scale[h][i / 2]);
    }
  }

  template <int>
  __device__ __forceinline__ void minimum_fragment(uint32_t (&a)[4]) const {
    a[0] = a[2] = minimum[0];
    a[1] = a[3] = minimum[1];
  }
  __device__ __forceinline__ float minimum_scale(int h) const { return -dmin[h]; }

 private:
  // Bits `group` of the bytes of v from bit `byte` on, every second one, to bit `to` of halves.
  template <int group, int byte, int to>
  static __device__ __forceinline__ uint32_t fifth_bits(uint32_t v) {
    if constexpr (!fifth) return 0u;
    constexpr int right = group + byte - to;
    return (right >= 0 ? v >> (right & 31) : v << (-right & 31)) & (0x00010001u << to);
  }
};
template <>
struct Fragments<Format::Q4_K> : ScaledMinima<Format::Q4_K, false> {
  using ScaledMinima::ScaledMinima;
};
template <>
struct Fragments<Format::Q5_K> : ScaledMinima<Format::Q5_K, true> {
  using ScaledMinima::ScaledMinima;
};

// Groups j and j + 2 of a half super-block: low and high nibbles of the same bytes. The numbers of
// the latter stay 16 times too large, up to 1008, which a subnormal half just holds.
template <>
struct Fragments<Format::Q6_K> {
  static constexpr float kResultScale = fragments::kSubnormal;
  static constexpr Format F = Format::Q6_K;
  static constexpr int kScales = 2;
  static constexpr int kMinima = 0;
  static constexpr RowLayout kRows = RowLayout::packed;
  static constexpr int first(int i) { return 4 * (i / 2) + i % 2; }
  static constexpr int second(int i) { return first(i) + 2; }

  const std::byte* stage;
  uint4 scale[2];  // 16 signed bytes
  float d[2];
  __device__ __forceinline__ Fragments(const std::byte* s, int unit) : stage(s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::byte* row = fragments::lane_row<F>(s, h);
      scale[h] = *reinterpret_cast<const uint4*>(row + StageLayout<F>::at(2));
      d[h] = half_at(row + StageLayout<F>::at(3) + 2 * (unit % 8));
    }
  }

  template <int i>
  __device__ __forceinline__ void pair(PairFragments& f) const {
    using namespace fragments;
    constexpr int half = i / 2, j = i % 2;
    uint32_t low[4], high[4];
    load_pieces<F>(low, stage, 64 * half + 32 * j, 64 * half + 32 * j + 16);
    load_pieces<F>(high, stage, StageLayout<F>::at(1) + 32 * half,
                   StageLayout<F>::at(1) + 32 * half + 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // piece k / 2, row half k % 2
      const uint32_t w = low[k], v = high[k] << (4 - 2 * j);
      const uint32_t odd_w = w >> 8, odd_v = high[k] >> (4 + 2 * j);
      f.a[k / 2][k % 2] = number<1>(w, v);
      f.a[k / 2][2 + k % 2] = number<1>(odd_w, odd_v);
      f.a[2 + k / 2][k % 2] = number<16>(w, v);
      f.a[2 + k / 2][2 + k % 2] = number<16>(odd_w, odd_v);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t s0 = half == 0 ? scale[h].x : scale[h].z;
      const uint32_t s1 = half == 0 ? scale[h].y : scale[h].w;
      f.scale[0][0][h] = d[h] * signed_byte_float<2 * j>(s0);
      f.scale[0][1][h] = d[h] * signed_byte_float<2 * j + 1>(s0);
      f.scale[1][0][h] = d[h] * 0.0625f * signed_byte_float<2 * j>(s1);
      f.scale[1][1][h] = d[h] * 0.0625f * signed_byte_float<2 * j + 1>(s1);
    }
  }

 private:
  // `times` the numbers of every second byte, four bits of low and two of high.
  template <int times>
  static __device__ __forceinline__ uint32_t number(uint32_t low, uint32_t high) {
    using namespace fragments;
    return minus_subnormal<32 * times>(and_or(low, kLow4 * times, high & (0x00300030u * times)));
  }
};

// Two bits of four groups lie in a byte: a number stays 4^j times too large, and its scale is
// divided by that.
template <>
struct Fragments<Format::Q2_K> : NeighbourGroups {
  static constexpr float kResultScale = fragments::kSubnormal;
  static constexpr Format F = Format::Q2_K;
  static constexpr int kScales = 2;
  static constexpr int kMinima = 2;
  static constexpr RowLayout kRows = RowLayout::packed_sums16;

  const std::byte* stage;
  uint32_t minimum[2];  // of the four groups of 16 that are this lane's
  float d[2], dmin[2];
  __device__ __forceinline__ Fragments(const std::byte* s, int unit) : stage(s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::byte* row = fragments::lane_row<F>(s, h);
      minimum[h] = (word_at(row + StageLayout<F>::at(1) + 4 * (lane_id() % 4)) >> 4) & 0x0f0f0f0fu;
      const float2 both =
          fragments::float_pair(word_at(row + StageLayout<F>::at(2) + 4 * (unit % 4)));
      d[h] = both.x;
      dmin[h] = both.y;
    }
  }

  template <int i>
  __device__ __forceinline__ void pair(PairFragments& f) const {
    using namespace fragments;
    constexpr int half = i / 2, j = 2 * (i % 2);
    constexpr uint32_t first_bits = 0x00030003u << (2 * j), second_bits = first_bits << 2;
    uint32_t r[4];
    load_pieces<F>(r, stage, 32 * half, 32 * half + 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // piece k / 2, row half k % 2
      f.a[k / 2][k % 2] = r[k] & first_bits;
      f.a[k / 2][2 + k % 2] = (r[k] >> 8) & first_bits;
      f.a[2 + k / 2][k % 2] = r[k] & second_bits;
      f.a[2 + k / 2][2 + k % 2] = (r[k] >> 8) & second_bits;
    }
    constexpr float first_scale = 1.0f / (1 << (2 * j)), second_scale = first_scale / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t s =
          word_at(lane_row<F>(stage, h) + StageLayout<F>::at(1) + 4 * i) & 0x0f0f0f0fu;
      f.scale[0][0][h] = d[h] * first_scale * byte_float<0>(s);
      f.scale[0][1][h] = d[h] * first_scale * byte_float<1>(s);
      f.scale[1][0][h] = d[h] * second_scale * byte_float<2>(s);
      f.scale[1][1][h] = d[h] * second_scale * byte_float<3>(s);
    }
  }

  template <int j>
  __device__ __forceinline__ void minimum_fragment(uint32_t (&a)[4]) const {
    constexpr unsigned bytes = j == 0 ? 0x4140 : 0x4342;
    a[0] = a[2] = __byte_perm(minimum[0], 0u, bytes);
    a[1] = a[3] = __byte_perm(minimum[1], 0u, bytes);
  }
  __device__ __forceinline__ float minimum_scale(int h) const { return -dmin[h]; }
};

template <>
struct Fragments<Format::Q3_K> : NeighbourGroups {
  static constexpr float kResultScale = fragments::kSubnormal;
  static constexpr Format F = Format::Q3_K;
  static constexpr int kScales = 2;
  static constexpr int kMinima = 0;
  static constexpr RowLayout kRows = RowLayout::packed;

  const std::byte* stage;
  uint32_t scale[2][4];  // bytes: six bits each
  float d[2];
  __device__ __forceinline__ Fragments(const std::byte* s, int unit) : stage(s) {
    constexpr uint32_t kFour = 0x0f0f0f0fu, kTop = 0x30303030u;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::byte* row = fragments::lane_row<F>(s, h);
      const std::byte* head = row + StageLayout<F>::at(2) + 12 * unit % 16;
      const uint32_t w0 = word_at(head), w1 = word_at(head + 4), w2 = word_at(head + 8);
      scale[h][0] = (w0 & kFour) | ((w2 << 4) & kTop);
      scale[h][1] = (w1 & kFour) | ((w2 << 2) & kTop);
      scale[h][2] = ((w0 >> 4) & kFour) | (w2 & kTop);
      scale[h][3] = ((w1 >> 4) & kFour) | ((w2 >> 2) & kTop);
      d[h] = half_at(row + StageLayout<F>::at(3) + 2 * (unit % 8));
    }
  }

  template <int i>
  __device__ __forceinline__ void pair(PairFragments& f) const {
    using namespace fragments;
    constexpr int half = i / 2, j = 2 * (i % 2);
    uint32_t low[4], high[4];
    load_pieces<F>(low, stage, 32 * half, 32 * half + 16);
    load_pieces<F>(high, stage, StageLayout<F>::at(1), StageLayout<F>::at(1) + 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // piece k / 2, row half k % 2
      f.a[k / 2][k % 2] = number<j, 2 * i>(low[k], high[k]);
      f.a[k / 2][2 + k % 2] = number<j, 2 * i>(low[k] >> 8, high[k] >> 8);
      f.a[2 + k / 2][k % 2] = number<j + 1, 2 * i + 1>(low[k], high[k]);
      f.a[2 + k / 2][2 + k % 2] = number<j + 1, 2 * i + 1>(low[k] >> 8, high[k] >> 8);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      f.scale[0][0][h] = d[h] * (byte_float<0>(scale[h][i]) - 32.0f);
      f.scale[0][1][h] = d[h] * (byte_float<1>(scale[h][i]) - 32.0f);
      f.scale[1][0][h] = d[h] * (byte_float<2>(scale[h][i]) - 32.0f);
      f.scale[1][1][h] = d[h] * (byte_float<3>(scale[h][i]) - 32.0f);
    }
  }

 private:
  template <int j, int group>
  static __device__ __forceinline__ uint32_t number(uint32_t low, uint32_t mask) {
    using namespace fragments;
    constexpr int right = group - 2;
    const uint32_t third = right >= 0 ? mask >> (right & 31) : mask << (-right & 31);
    return minus_subnormal<4>(and_or(low >> (2 * j), 0x00030003u, third & 0x00040004u));
  }
};

// Plain numbers: 16 bytes of a lane are its share of two products.
template <Format F, RowLayout rows>
struct PlainFragments : NeighbourGroups {
  static constexpr float kResultScale = 1.0f;
  static constexpr int kScales = 0;
  static constexpr int kMinima = 0;
  static constexpr RowLayout kRows = rows;

  const std::byte* stage;
  __device__ __forceinline__ PlainFragments(const std::byte* s, int) : stage(s) {}
  template <int>
  __device__ __forceinline__ void pair(PairFragments& f) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // group k / 2, row half k % 2
      const std::byte* at = fragments::lane_row<F>(stage, k % 2) + 64 * (k / 2);
      const uint4 v = *reinterpret_cast<const uint4*>(at + 16 * (lane_id() % 4));
      f.a[k / 2 * 2][k % 2] = v.x;
      f.a[k / 2 * 2][2 + k % 2] = v.y;
      f.a[k / 2 * 2 + 1][k % 2] = v.z;
      f.a[k / 2 * 2 + 1][2 + k % 2] = v.w;
    }
  }
};
template <>
struct Fragments<Format::F16> : PlainFragments<Format::F16, RowLayout::plain_f16> {
  using PlainFragments::PlainFragments;
};
template <>
struct Fragments<Format::BF16> : PlainFragments<Format::BF16, RowLayout::plain_bf16> {
  using PlainFragments::PlainFragments;
};

}  // namespace mla::cuda
