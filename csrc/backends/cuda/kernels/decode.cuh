// Packed weights to numbers, 32 elements at a time.
//
// Formula and bits: quant/blocks.h. Layout: packed.h; a group is elements 32 g .. 32 g + 31 of a
// row, one block of the small formats and an eighth of the large ones. Every format keeps the
// bytes of a group at a multiple of its natural word, so groups are read in words of 4 to 16 bytes.
// Error: one rounding of float where a product and a min meet; halves are that result rounded.
#pragma once

#include "backends/cuda/kernels/intrinsics.cuh"
#include "backends/cuda/packed.h"

namespace mla::cuda {

inline constexpr int kDecodeGroup = 32;  // elements decoded at a time

// ---- pieces of planes ---------------------------------------------------------------------------

template <Format F>
__device__ __forceinline__ const std::byte* plane(const std::byte* row, int index,
                                                  int64_t n_blocks) {
  return row + plane_offset<F>(index, n_blocks);
}

__device__ __forceinline__ float half_at(const std::byte* p) {
  return __half2float(*reinterpret_cast<const __half*>(p));
}
__device__ __forceinline__ uint32_t word_at(const std::byte* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}

// n consecutive words, from an address that is a multiple of 16 where n is of 4.
template <int n>
__device__ __forceinline__ void load_words(const std::byte* p, uint32_t (&out)[n]) {
  static_assert(n % 4 == 0);
#pragma unroll
  for (int i = 0; i < n / 4; ++i) {
    const uint4 v = reinterpret_cast<const uint4*>(p)[i];
    out[4 * i] = v.x;
    out[4 * i + 1] = v.y;
    out[4 * i + 2] = v.z;
    out[4 * i + 3] = v.w;
  }
}

// Byte i of consecutive words; i is known when compiling.
template <int n>
__device__ __forceinline__ uint32_t byte_of(const uint32_t (&words)[n], int i) {
  return (words[i / 4] >> (8 * (i % 4))) & 255u;
}

// Four of the sixteen levels of the non-linear formats, 128 added, as bytes of a word.
constexpr uint32_t iq4_level_word(int first) {
  uint32_t word = 0;
  for (int i = 3; i >= 0; --i) {
    word = (word << 8) | static_cast<uint32_t>(block::kIq4Levels[first + i] + 128);
  }
  return word;
}
__device__ __forceinline__ float iq4_level(uint32_t q) {
  constexpr uint32_t words[4] = {iq4_level_word(0), iq4_level_word(4), iq4_level_word(8),
                                 iq4_level_word(12)};
  const uint32_t low = (q & 4u) != 0 ? words[1] : words[0];
  const uint32_t high = (q & 4u) != 0 ? words[3] : words[2];
  const uint32_t word = (q & 8u) != 0 ? high : low;
  return static_cast<float>(static_cast<int>((word >> (8 * (q & 3u))) & 255u) - 128);
}

// Six-bit scale and min of group g (of 8) from the 12 bytes that follow d and dmin.
struct ScaleMin {
  float scale, min;
};
__device__ __forceinline__ ScaleMin k4_scale_min(uint32_t w0, uint32_t w1, uint32_t w2, int g) {
  const int shift = 8 * (g & 3);
  const uint32_t b0 = (w0 >> shift) & 255u, b1 = (w1 >> shift) & 255u, b2 = (w2 >> shift) & 255u;
  const uint32_t scale = g < 4 ? b0 & 63u : (b2 & 15u) | ((b0 >> 6) << 4);
  const uint32_t min = g < 4 ? b1 & 63u : (b2 >> 4) | ((b1 >> 6) << 4);
  return {static_cast<float>(scale), static_cast<float>(min)};
}

// ---- one group of each format -------------------------------------------------------------------

namespace decoding {

// out[l], out[l + 16]: the low and the high nibble of byte l.
template <class Value>
__device__ __forceinline__ void nibbles(const std::byte* qs, float (&out)[32], const Value& value) {
  uint32_t w[4];
  load_words(qs, w);
#pragma unroll
  for (int l = 0; l < 16; ++l) {
    const uint32_t q = byte_of(w, l);
    out[l] = value(q & 15u, l);
    out[l + 16] = value(q >> 4, l + 16);
  }
}

// 4-bit formats of small blocks, with a fifth bit from plane 1 where there is one.
template <Format F, bool fifth, bool min>
__device__ __forceinline__ void small_block(const std::byte* row, int64_t n, int64_t g,
                                            float (&out)[32]) {
  const std::byte* head = plane<F>(row, fifth ? 2 : 1, n) + g * (min ? 4 : 2);
  const float d = half_at(head);
  const float m = min ? half_at(head + 2) : 0.0f;
  const uint32_t qh = fifth ? word_at(plane<F>(row, 1, n) + 4 * g) : 0u;
  const int zero = min ? 0 : (fifth ? 16 : 8);
  nibbles(row + 16 * g, out, [&](uint32_t low, int l) {
    const uint32_t q = fifth ? low | (((qh >> l) & 1u) << 4) : low;
    return d * static_cast<float>(static_cast<int>(q) - zero) + m;
  });
}

// Q4_K and Q5_K: group g has the low (even g) or high nibbles of 32 bytes.
template <Format F, bool fifth>
__device__ __forceinline__ void k4_group(const std::byte* row, int64_t n, int64_t group,
                                         float (&out)[32]) {
  const int64_t b = group / 8;
  const int g = static_cast<int>(group % 8);
  uint32_t head[4], qs[8], qh[8] = {};
  load_words(plane<F>(row, fifth ? 2 : 1, n) + 16 * b, head);
  load_words(row + 128 * b + 32 * (g / 2), qs);
  if (fifth) load_words(plane<F>(row, 1, n) + 32 * b, qh);
  const ScaleMin k = k4_scale_min(head[1], head[2], head[3], g);
  const float2 d = __half22float2(*reinterpret_cast<const __half2*>(&head[0]));
  const float scale = d.x * k.scale, min = d.y * k.min;
#pragma unroll
  for (int l = 0; l < 32; ++l) {
    uint32_t q = (byte_of(qs, l) >> (4 * (g & 1))) & 15u;
    if (fifth) q |= ((byte_of(qh, l) >> g) & 1u) << 4;
    out[l] = scale * static_cast<float>(q) - min;
  }
}

__device__ __forceinline__ void q8_0(const std::byte* row, int64_t n, int64_t g, float (&out)[32]) {
  const float d = half_at(plane<Format::Q8_0>(row, 1, n) + 2 * g);
  uint32_t w[8];
  load_words(row + 32 * g, w);
#pragma unroll
  for (int l = 0; l < 32; ++l) {
    out[l] = d * static_cast<float>(static_cast<int8_t>(byte_of(w, l)));
  }
}

__device__ __forceinline__ void q2_k(const std::byte* row, int64_t n, int64_t group,
                                     float (&out)[32]) {
  const int64_t b = group / 8;
  const int g = static_cast<int>(group % 8);
  uint32_t qs[8];
  load_words(row + 64 * b + 32 * (g / 4), qs);
  const std::byte* scales = plane<Format::Q2_K>(row, 1, n) + 16 * b + 2 * g;
  const std::byte* head = plane<Format::Q2_K>(row, 2, n) + 4 * b;
  const float d = half_at(head), dmin = half_at(head + 2);
#pragma unroll
  for (int l = 0; l < 32; ++l) {
    const auto s = static_cast<uint32_t>(scales[l / 16]);
    const uint32_t q = (byte_of(qs, l) >> (2 * (g & 3))) & 3u;
    out[l] =
        d * static_cast<float>(s & 15u) * static_cast<float>(q) - dmin * static_cast<float>(s >> 4);
  }
}

__device__ __forceinline__ void q3_k(const std::byte* row, int64_t n, int64_t group,
                                     float (&out)[32]) {
  const int64_t b = group / 8;
  const int g = static_cast<int>(group % 8);
  uint32_t qs[8], mask[8];
  load_words(row + 64 * b + 32 * (g / 4), qs);
  load_words(plane<Format::Q3_K>(row, 1, n) + 32 * b, mask);
  const std::byte* scales = plane<Format::Q3_K>(row, 2, n) + 12 * b;
  const float d = half_at(plane<Format::Q3_K>(row, 3, n) + 2 * b);
  float s[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = 2 * g + half;  // low nibbles of the first eight bytes, then high; see blocks.h
    const int low = (static_cast<int>(scales[i & 7]) >> (i < 8 ? 0 : 4)) & 15;
    const int high = (static_cast<int>(scales[8 + (i & 3)]) >> (2 * (i >> 2))) & 3;
    s[half] = d * static_cast<float>((low | (high << 4)) - 32);
  }
#pragma unroll
  for (int l = 0; l < 32; ++l) {
    const uint32_t low = (byte_of(qs, l) >> (2 * (g & 3))) & 3u;
    const uint32_t q = low | (((byte_of(mask, l) >> g) & 1u) << 2);
    out[l] = s[l / 16] * static_cast<float>(static_cast<int>(q) - 4);
  }
}

__device__ __forceinline__ void q6_k(const std::byte* row, int64_t n, int64_t group,
                                     float (&out)[32]) {
  const int64_t b = group / 8;
  const int g = static_cast<int>(group % 8);
  const int h = g / 4, j = g & 3;
  uint32_t ql[8], qh[8];
  load_words(row + 128 * b + 64 * h + 32 * (j & 1), ql);
  load_words(plane<Format::Q6_K>(row, 1, n) + 64 * b + 32 * h, qh);
  const std::byte* scales = plane<Format::Q6_K>(row, 2, n) + 16 * b + 2 * g;
  const float d = half_at(plane<Format::Q6_K>(row, 3, n) + 2 * b);
#pragma unroll
  for (int l = 0; l < 32; ++l) {
    const uint32_t low = (byte_of(ql, l) >> (4 * (j >> 1))) & 15u;
    const uint32_t q = low | (((byte_of(qh, l) >> (2 * j)) & 3u) << 4);
    const float s = d * static_cast<float>(static_cast<int8_t>(scales[l / 16]));
    out[l] = s * static_cast<float>(static_cast<int>(q) - 32);
  }
}

__device__ __forceinline__ void iq4_nl(const std::byte* row, int64_t n, int64_t g,
                                       float (&out)[32]) {
  const float d = half_at(plane<Format::IQ4_NL>(row, 1, n) + 2 * g);
  nibbles(row + 16 * g, out, [&](uint32_t q, int) { return d * iq4_level(q); });
}

__device__ __forceinline__ void iq4_xs(const std::byte* row, int64_t n, int64_t group,
                                       float (&out)[32]) {
  const int64_t b = group / 8;
  const int g = static_cast<int>(group % 8);
  const uint2 head = *reinterpret_cast<const uint2*>(plane<Format::IQ4_XS>(row, 1, n) + 8 * b);
  const float d = __half2float(__ushort_as_half(static_cast<unsigned short>(head.x & 0xffffu)));
  const uint32_t low = (head.y >> (4 * g)) & 15u, high = (head.x >> (16 + 2 * g)) & 3u;
  const float s = d * static_cast<float>(static_cast<int>(low | (high << 4)) - 32);
  nibbles(row + 16 * group, out, [&](uint32_t q, int) { return s * iq4_level(q); });
}

template <class T>
__device__ __forceinline__ void plain(const std::byte* row, int64_t g, float (&out)[32]) {
  const T* p = reinterpret_cast<const T*>(row) + kDecodeGroup * g;
#pragma unroll
  for (int l = 0; l < 32; ++l) out[l] = static_cast<float>(p[l]);
}

}  // namespace decoding

// out[l] = element 32 * group + l of a row of n_blocks blocks, packed or plain.
template <Format F>
__device__ __forceinline__ void decode_group(const std::byte* row, int64_t n_blocks, int64_t group,
                                             float (&out)[32]) {
  using namespace decoding;
  if constexpr (F == Format::F32) plain<float>(row, group, out);
  if constexpr (F == Format::F16) plain<__half>(row, group, out);
  if constexpr (F == Format::BF16) plain<__nv_bfloat16>(row, group, out);
  if constexpr (F == Format::Q4_0) small_block<F, false, false>(row, n_blocks, group, out);
  if constexpr (F == Format::Q4_1) small_block<F, false, true>(row, n_blocks, group, out);
  if constexpr (F == Format::Q5_0) small_block<F, true, false>(row, n_blocks, group, out);
  if constexpr (F == Format::Q5_1) small_block<F, true, true>(row, n_blocks, group, out);
  if constexpr (F == Format::Q8_0) q8_0(row, n_blocks, group, out);
  if constexpr (F == Format::IQ4_NL) iq4_nl(row, n_blocks, group, out);
  if constexpr (F == Format::Q2_K) q2_k(row, n_blocks, group, out);
  if constexpr (F == Format::Q3_K) q3_k(row, n_blocks, group, out);
  if constexpr (F == Format::Q4_K) k4_group<F, false>(row, n_blocks, group, out);
  if constexpr (F == Format::Q5_K) k4_group<F, true>(row, n_blocks, group, out);
  if constexpr (F == Format::Q6_K) q6_k(row, n_blocks, group, out);
  if constexpr (F == Format::IQ4_XS) iq4_xs(row, n_blocks, group, out);
}

template <Format F>
__device__ __forceinline__ void decode_group_half(const std::byte* row, int64_t n_blocks,
                                                  int64_t group, __half2 (&out)[16]) {
  float values[32];
  decode_group<F>(row, n_blocks, group, values);
#pragma unroll
  for (int i = 0; i < 16; ++i) out[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
}

}  // namespace mla::cuda
