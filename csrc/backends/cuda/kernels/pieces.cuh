// Packed weights as words of four 8-bit integers, 16 bytes of a row's first plane at a time.
//
// A lane of matvec.cuh reads a piece from shared memory: 16 bytes of quants and what belongs to
// them. It holds kParts parts of 16 weights each, neighbours along k from k(piece, part) on:
//
//   weight = scale(part) * q - min(part),   q the bytes of words<part>()
//
// q is what is stored, without its offset: the offset times the scale is part of the minimum.
// Bits: quant/blocks.h. Planes: packed.h. All addresses are multiples of what is read there.
#pragma once

#include "backends/cuda/kernels/decode.cuh"
#include "backends/cuda/matvec.h"

namespace mla::cuda {

namespace pieces {

inline constexpr uint32_t kNibbles = 0x0f0f0f0fu, kCrumbs = 0x03030303u, kBits = 0x01010101u;

__device__ __forceinline__ uint4 load16(const std::byte* p) {
  return *reinterpret_cast<const uint4*>(p);
}
__device__ __forceinline__ uint32_t word(const uint4& v, int j) {
  return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
}
// Bits 0 .. 3 to bit 0 of four bytes.
__device__ __forceinline__ uint32_t spread(uint32_t bits) {
  return ((bits & 15u) * 0x00204081u) & kBits;
}
__device__ __forceinline__ float2 half_pair(uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
__device__ __forceinline__ uint32_t byte_at(const std::byte* p) {
  return static_cast<uint32_t>(*p);
}

// Levels of four nibbles, one in each byte of v.
__device__ __forceinline__ uint32_t iq4_levels(uint32_t v) {
  constexpr uint32_t kSigned = 0x80808080u;  // iq4_level_word adds 128 to each
  constexpr uint32_t t0 = iq4_level_word(0) ^ kSigned, t1 = iq4_level_word(4) ^ kSigned;
  constexpr uint32_t t2 = iq4_level_word(8) ^ kSigned, t3 = iq4_level_word(12) ^ kSigned;
  const uint32_t low = v & 0x07070707u;
  const uint32_t select = __byte_perm(low | (low >> 4), 0, 0x0020);
  const uint32_t upper = ((v >> 3) & kBits) * 255u;
  return (__byte_perm(t0, t1, select) & ~upper) | (__byte_perm(t2, t3, select) & upper);
}

}  // namespace pieces

template <Format F>
struct Piece;

// ---- small blocks: a piece is a block, its parts the low and the high nibbles -------------------

template <Format F, bool fifth, bool has_min, int zero, bool levels>
struct SmallPiece {
  static constexpr int kParts = 2;
  uint4 q;
  uint32_t qh = 0;
  float2 dm;

  __device__ __forceinline__ void load(const std::byte* row, const int (&planes)[kMaxPlanes],
                                       uint32_t piece) {
    q = pieces::load16(row + 16 * piece);
    if constexpr (fifth) qh = word_at(row + planes[1] + 4 * piece);
    const std::byte* head = row + planes[fifth ? 2 : 1];
    if constexpr (has_min) {
      dm = pieces::half_pair(word_at(head + 4 * piece));
    } else {
      dm = {half_at(head + 2 * piece), 0.0f};
    }
  }
  __device__ __forceinline__ static uint32_t k(uint32_t piece, uint32_t part) {
    return 32 * piece + 16 * part;
  }
  template <int part>
  __device__ __forceinline__ int word(int j) const {
    uint32_t w = (pieces::word(q, j) >> (4 * part)) & pieces::kNibbles;
    if constexpr (fifth) w |= pieces::spread(qh >> (16 * part + 4 * j)) << 4;
    if constexpr (levels) w = pieces::iq4_levels(w);
    return static_cast<int>(w);
  }
  template <int part>
  __device__ __forceinline__ float2 scale_min() const {
    return {dm.x, has_min ? -dm.y : dm.x * zero};
  }
};
template <>
struct Piece<Format::Q4_0> : SmallPiece<Format::Q4_0, false, false, 8, false> {};
template <>
struct Piece<Format::Q4_1> : SmallPiece<Format::Q4_1, false, true, 0, false> {};
template <>
struct Piece<Format::Q5_0> : SmallPiece<Format::Q5_0, true, false, 16, false> {};
template <>
struct Piece<Format::Q5_1> : SmallPiece<Format::Q5_1, true, true, 0, false> {};
template <>
struct Piece<Format::IQ4_NL> : SmallPiece<Format::IQ4_NL, false, false, 0, true> {};

template <>
struct Piece<Format::Q8_0> {
  static constexpr int kParts = 1;
  uint4 q;
  float d;
  __device__ __forceinline__ void load(const std::byte* row, const int (&planes)[kMaxPlanes],
                                       uint32_t piece) {
    q = pieces::load16(row + 16 * piece);
    d = half_at(row + planes[1] + 2 * (piece / 2));
  }
  __device__ __forceinline__ static uint32_t k(uint32_t piece, uint32_t) { return 16 * piece; }
  template <int>
  __device__ __forceinline__ int word(int j) const {
    return static_cast<int>(pieces::word(q, j));
  }
  template <int>
  __device__ __forceinline__ float2 scale_min() const {
    return {d, 0.0f};
  }
};

template <>
struct Piece<Format::IQ4_XS> {
  static constexpr int kParts = 2;
  uint4 q;
  float s;
  __device__ __forceinline__ void load(const std::byte* row, const int (&planes)[kMaxPlanes],
                                       uint32_t piece) {
    q = pieces::load16(row + 16 * piece);
    const uint2 head = *reinterpret_cast<const uint2*>(row + planes[1] + piece / 8 * 8);
    const uint32_t g = piece % 8;
    const uint32_t low = (head.y >> (4 * g)) & 15u, high = (head.x >> (16 + 2 * g)) & 3u;
    s = pieces::half_pair(head.x).x * static_cast<float>(static_cast<int>(low | (high << 4)) - 32);
  }
  __device__ __forceinline__ static uint32_t k(uint32_t piece, uint32_t part) {
    return 32 * piece + 16 * part;
  }
  template <int part>
  __device__ __forceinline__ int word(int j) const {
    return static_cast<int>(
        pieces::iq4_levels((pieces::word(q, j) >> (4 * part)) & pieces::kNibbles));
  }
  template <int>
  __device__ __forceinline__ float2 scale_min() const {
    return {s, 0.0f};
  }
};

// ---- super-blocks: piece i of a block is bytes 16 i of its quants -------------------------------

// Q4_K, Q5_K: groups 2 (i / 2) and 2 (i / 2) + 1, from element 16 (i & 1) on.
template <Format F, bool fifth>
struct K4Piece {
  static constexpr int kParts = 2;
  uint4 q, qh;
  float2 d;
  uint32_t pair;    // of groups
  uint32_t levels;  // scales of both groups, then their mins: a byte each

  __device__ __forceinline__ void load(const std::byte* row, const int (&planes)[kMaxPlanes],
                                       uint32_t piece) {
    const uint32_t b = piece / 8;
    pair = piece % 8 / 2;
    q = pieces::load16(row + 16 * piece);
    const uint4 head = pieces::load16(row + planes[fifth ? 2 : 1] + 16 * b);
    if constexpr (fifth) qh = pieces::load16(row + planes[1] + 32 * b + 16 * (piece % 2));
    d = pieces::half_pair(head.x);
    // Four groups at a time, six bits each: of the upper four, two lie with the lower ones.
    constexpr uint32_t kSix = 0x3f3f3f3fu, kUpper = 0x30303030u;
    const bool upper = pair >= 2;
    const uint32_t scales =
        upper ? (head.w & pieces::kNibbles) | ((head.y >> 2) & kUpper) : head.y & kSix;
    const uint32_t mins =
        upper ? ((head.w >> 4) & pieces::kNibbles) | ((head.z >> 2) & kUpper) : head.z & kSix;
    levels = __byte_perm(scales, mins, pair % 2 == 0 ? 0x5410 : 0x7632);
  }
  __device__ __forceinline__ static uint32_t k(uint32_t piece, uint32_t part) {
    return 256 * (piece / 8) + 64 * (piece % 8 / 2) + 16 * (piece % 2) + 32 * part;
  }
  template <int part>
  __device__ __forceinline__ int word(int j) const {
    uint32_t w = (pieces::word(q, j) >> (4 * part)) & pieces::kNibbles;
    if constexpr (fifth) w |= ((pieces::word(qh, j) >> (2 * pair + part)) & pieces::kBits) << 4;
    return static_cast<int>(w);
  }
  template <int part>
  __device__ __forceinline__ float2 scale_min() const {
    const uint32_t scale = (levels >> (8 * part)) & 255u, min = (levels >> (8 * part + 16)) & 255u;
    return {d.x * static_cast<float>(scale), d.y * static_cast<float>(min)};
  }
};
template <>
struct Piece<Format::Q4_K> : K4Piece<Format::Q4_K, false> {};
template <>
struct Piece<Format::Q5_K> : K4Piece<Format::Q5_K, true> {};

// Groups 4 h + j and 4 h + j + 2 with h = i / 4, j = i / 2 & 1, from element 16 (i & 1) on.
template <>
struct Piece<Format::Q6_K> {
  static constexpr int kParts = 2;
  uint4 q, qh;
  float d;
  uint32_t scales[2];
  int j0;
  __device__ __forceinline__ void load(const std::byte* row, const int (&planes)[kMaxPlanes],
                                       uint32_t piece) {
    const uint32_t b = piece / 8, i = piece % 8;
    j0 = i / 2 & 1;
    q = pieces::load16(row + 16 * piece);
    qh = *reinterpret_cast<const uint4*>(row + planes[1] + 64 * b + i / 4 * 32 + 16 * (i & 1));
    const std::byte* s = row + planes[2] + 16 * b + 2 * (i / 4 * 4 + j0) + (i & 1);
    scales[0] = pieces::byte_at(s);
    scales[1] = pieces::byte_at(s + 4);
    d = half_at(row + planes[3] + 2 * b);
  }
  __device__ __forceinline__ static uint32_t k(uint32_t piece, uint32_t part) {
    const uint32_t i = piece % 8;
    return 256 * (piece / 8) + 32 * (i / 4 * 4 + (i / 2 & 1) + 2 * part) + 16 * (i & 1);
  }
  template <int part>
  __device__ __forceinline__ int word(int j) const {
    const uint32_t low = (pieces::word(q, j) >> (4 * part)) & pieces::kNibbles;
    const uint32_t high = (pieces::word(qh, j) >> (2 * j0 + 4 * part)) & pieces::kCrumbs;
    return static_cast<int>(low | (high << 4));
  }
  template <int part>
  __device__ __forceinline__ float2 scale_min() const {
    const float s = d * static_cast<float>(static_cast<int8_t>(scales[part]));
    return {s, 32.0f * s};
  }
};

// Q2_K, Q3_K: groups 4 h .. 4 h + 3 with h = i / 2, from element 16 (i & 1) on.
struct CrumbPiece {
  static constexpr int kParts = 4;
  __device__ __forceinline__ static uint32_t k(uint32_t piece, uint32_t part) {
    return 256 * (piece / 4) + 128 * (piece % 4 / 2) + 32 * part + 16 * (piece % 2);
  }
};

template <>
struct Piece<Format::Q2_K> : CrumbPiece {
  uint4 q;
  uint2 scales;  // of the eight sixteens of half a block
  float2 dm;
  int odd;
  __device__ __forceinline__ void load(const std::byte* row, const int (&planes)[kMaxPlanes],
                                       uint32_t piece) {
    const uint32_t b = piece / 4;
    odd = piece % 2;
    q = pieces::load16(row + 16 * piece);
    scales = *reinterpret_cast<const uint2*>(row + planes[1] + 8 * (piece / 2));
    dm = pieces::half_pair(word_at(row + planes[2] + 4 * b));
  }
  template <int part>
  __device__ __forceinline__ int word(int j) const {
    return static_cast<int>((pieces::word(q, j) >> (2 * part)) & pieces::kCrumbs);
  }
  template <int part>
  __device__ __forceinline__ float2 scale_min() const {
    const uint32_t s = (part < 2 ? scales.x : scales.y) >> (16 * (part % 2) + 8 * odd);
    return {dm.x * static_cast<float>(s & 15u), dm.y * static_cast<float>((s >> 4) & 15u)};
  }
};

template <>
struct Piece<Format::Q3_K> : CrumbPiece {
  uint4 q, mask;
  uint32_t scales[3];
  float d;
  int half, odd;
  __device__ __forceinline__ void load(const std::byte* row, const int (&planes)[kMaxPlanes],
                                       uint32_t piece) {
    const uint32_t b = piece / 4;
    half = piece % 4 / 2;
    odd = piece % 2;
    q = pieces::load16(row + 16 * piece);
    mask = *reinterpret_cast<const uint4*>(row + planes[1] + 32 * b + 16 * odd);
    for (int i = 0; i < 3; ++i) scales[i] = word_at(row + planes[2] + 12 * b + 4 * i);
    d = half_at(row + planes[3] + 2 * b);
  }
  template <int part>
  __device__ __forceinline__ int word(int j) const {
    const uint32_t high = (pieces::word(mask, j) >> (4 * half + part)) & pieces::kBits;
    return static_cast<int>(((pieces::word(q, j) >> (2 * part)) & pieces::kCrumbs) | (high << 2));
  }
  template <int part>
  __device__ __forceinline__ float2 scale_min() const {
    const int i = 2 * part + odd;  // of the eight sixteens; low nibbles for the first half
    const uint32_t low = scales[part / 2] >> (8 * (i & 3) + 4 * half);
    const uint32_t high = scales[2] >> (8 * (i & 3) + 2 * (2 * half + part / 2));
    const float s = d * static_cast<float>(static_cast<int>((low & 15u) | ((high & 3u) << 4)) - 32);
    return {s, 4.0f * s};
  }
};

}  // namespace mla::cuda
