// Rows of any weight format as float32, up to 256 elements at a time, and the packing of
// activations.
#pragma once

#include "backends/cpu/kernels.h"
#include "backends/cpu/kernels/unpack.inc.h"

namespace mla::cpu::MLA_ISA {
namespace {

inline constexpr int kChunk = block::kSuper;  // elements decoded at a time
static_assert(kChunk == kAcrossColumns && kPackedFloats % kLanes == 0);

inline constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- weights ------------------------------------------------------------------------------------
// Elements [begin, begin + n) of a row, n <= kChunk, as floats, zeros after them up to a whole
// register. begin is a multiple of the format's block. The result may be the row itself.
template <Format format>
struct Decode;

template <>
struct Decode<Format::F32> {
  static const float* chunk(const std::byte* row, int64_t begin, int64_t n, float* out) {
    const float* p = reinterpret_cast<const float*>(row) + begin;
    if (n % kLanes == 0) return p;
    std::memset(out, 0, kChunk * sizeof(float));
    std::memcpy(out, p, static_cast<size_t>(n) * sizeof(float));
    return out;
  }
};

template <F32 (*load_16bit)(const uint16_t*)>
inline const float* decode_16bit(const std::byte* row, int64_t begin, int64_t n, float* out) {
  const uint16_t* p = reinterpret_cast<const uint16_t*>(row) + begin;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load_16bit(p + i));
  if (i < n) {
    uint16_t padded[kLanes] = {};
    std::memcpy(padded, p + i, static_cast<size_t>(n - i) * sizeof(uint16_t));
    store(out + i, load_16bit(padded));
  }
  return out;
}
template <>
struct Decode<Format::F16> {
  static const float* chunk(const std::byte* row, int64_t begin, int64_t n, float* out) {
    return decode_16bit<load_f16>(row, begin, n, out);
  }
};
template <>
struct Decode<Format::BF16> {
  static const float* chunk(const std::byte* row, int64_t begin, int64_t n, float* out) {
    return decode_16bit<load_bf16>(row, begin, n, out);
  }
};

template <class B>
inline void to_floats(const WeightsOf<B>& w, float* out) {
  float scale[kScales<B>], min[kScales<B>] = {};
  std::memcpy(scale, &w.scale, sizeof scale);
  if constexpr (kHasMin<B>) std::memcpy(min, &w.min, sizeof min);
  const uint8_t* q = reinterpret_cast<const uint8_t*>(w.q);
  for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      const U8x16 bytes = load_as<U8x16>(q + place<typename WeightsOf<B>::Order>(g, half));
      const F32x16 x = kIsSigned<B> ? widen_s8(bytes) : widen_u8(bytes);
      const int s = kScales<B> == 16 ? 2 * g + half : g;
      for (int i = 0; i < kSixteen; ++i) {
        store(out + g * kGroup + half * 16 + i * kLanes, x.v[i] * set1(scale[s]) - set1(min[s]));
      }
    }
  }
}

template <class B>
inline const float* decode_blocks(const std::byte* row, int64_t begin, int64_t n, float* out) {
  const B* b = reinterpret_cast<const B*>(row) + begin / kBlockElems<B>;
  WeightsOf<B> w;
  if (n == kChunk) {
    unpack(b, w);
  } else {
    unpack_tail(b, n, w);
  }
  to_floats<B>(w, out);
  return out;
}
#define MLA_FORMAT(name, gguf, elems, bytes)                                                \
  template <>                                                                               \
  struct Decode<Format::name> {                                                             \
    static const float* chunk(const std::byte* row, int64_t begin, int64_t n, float* out) { \
      return decode_blocks<block::name>(row, begin, n, out);                                \
    }                                                                                       \
  };
#include "quant/formats.def"

template <Format format>
inline void decode_row(const std::byte* row, int64_t n_elems, float* out) {
  alignas(64) float buffer[kChunk];
  for (int64_t i = 0; i < n_elems; i += kChunk) {
    const int64_t n = smaller(kChunk, n_elems - i);
    const float* x = Decode<format>::chunk(row, i, n, buffer);
    std::memcpy(out + i, x, static_cast<size_t>(n) * sizeof(float));
  }
}

inline void decode(Format format, const std::byte* row, int64_t n_elems, float* out) noexcept {
  switch (format) {
#define MLA_FLOAT(name, gguf, elems, bytes) \
  case Format::name:                        \
    return decode_row<Format::name>(row, n_elems, out);
#define MLA_FORMAT(name, gguf, elems, bytes) \
  case Format::name:                         \
    return decode_row<Format::name>(row, n_elems, out);
#include "quant/formats.def"
    case Format::I32:
      return;
  }
}

// ---- activations --------------------------------------------------------------------------------
// Packing::q8: 256 activations as bytes, in both orders of weights, with a scale for each group of
// 32 and the scaled sums, which meet the weights' mins. A row that is no multiple of 256 ends with
// a pack of its last 256 elements, of which those that an earlier pack has are zeros: the weights
// are then read without a copy. Rows shorter than 256 are padded with zeros.
struct alignas(64) PackedSuper {
  int8_t paired[block::kSuper], whole[block::kSuper];
  float scale[kGroups], sum[kGroups];
  float half_scale[2 * kGroups], half_sum[2 * kGroups];  // for scales of w per 16
};
inline constexpr int kPadBf16 = 32;

inline size_t packed_bytes(Packing packing, int64_t k) noexcept {
  int64_t bytes = 0;
  switch (packing) {
    case Packing::f32:
      bytes = round_up(k, kPackedFloats) * static_cast<int64_t>(sizeof(float));
      break;
    case Packing::bf16:
      bytes = round_up(k, kPadBf16) * static_cast<int64_t>(sizeof(uint16_t));
      break;
    case Packing::q8:
      bytes =
          round_up(k, block::kSuper) / block::kSuper * static_cast<int64_t>(sizeof(PackedSuper));
      break;
  }
  // An odd number of cache lines: rows a power of two apart would fight for the same few sets.
  return static_cast<size_t>(((bytes + 63) / 64 | 1) * 64);
}

inline float element(const std::byte* p, Format format) {
  if (format == Format::F32) return load_as<float>(p);
  const uint16_t bits = load_as<uint16_t>(p);
  return format == Format::F16 ? f16_to_f32(bits) : bf16_to_float(bits);
}

// Elements [begin, begin + n) of a strided row, n <= kChunk; zeros up to kChunk.
inline void gather(const std::byte* x, Format format, int64_t stride_bytes, int64_t begin,
                   int64_t n, float* out) {
  if (stride_bytes == (format == Format::F32 ? 4 : 2)) {
    const float* found = format == Format::F32   ? Decode<Format::F32>::chunk(x, begin, n, out)
                         : format == Format::F16 ? Decode<Format::F16>::chunk(x, begin, n, out)
                                                 : Decode<Format::BF16>::chunk(x, begin, n, out);
    if (found != out) std::memcpy(out, found, static_cast<size_t>(n) * sizeof(float));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = element(x + (begin + i) * stride_bytes, format);
  }
  for (int64_t i = n; i < kChunk; ++i) out[i] = 0.0f;
}

inline void pack_f32(const std::byte* x, Format format, int64_t stride_bytes, int64_t k,
                     std::byte* out) noexcept {
  alignas(64) float buffer[kChunk];
  for (int64_t i = 0; i < k; i += kChunk) {
    const int64_t n = smaller(kChunk, k - i);
    gather(x, format, stride_bytes, i, n, buffer);
    std::memcpy(reinterpret_cast<float*>(out) + i, buffer,
                static_cast<size_t>(round_up(n, kPackedFloats)) * sizeof(float));
  }
}

inline void pack_bf16(const std::byte* x, Format format, int64_t stride_bytes, int64_t k,
                      std::byte* out) noexcept {
  alignas(64) float buffer[kChunk];
  uint16_t* y = reinterpret_cast<uint16_t*>(out);
  for (int64_t i = 0; i < k; i += kChunk) {
    const int64_t n = smaller(kChunk, k - i);
    gather(x, format, stride_bytes, i, n, buffer);
    for (int64_t j = 0; j < round_up(n, kPadBf16); j += kLanes) {
      store_bf16(y + i + j, load(buffer + j));
    }
  }
}

// A group of floats -> bytes; returns the scale. Infinities and NaNs make the scale NaN, so that
// they reach the result.
inline float quantize_group(const float* x, int8_t* q) {
  typedef int8_t Narrow __attribute__((vector_size(kLanes)));
  F32 most = zero(), poison = zero();
  for (int i = 0; i < kGroup; i += kLanes) {
    const F32 v = load(x + i);
    most = max(most, max(v, zero() - v));
    poison = v * zero() + poison;
  }
  const float largest = reduce_max(most);
  // Below this 127 / largest would overflow; such a group counts as zeros.
  const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
  const F32 magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int i = 0; i < kGroup; i += kLanes) {
    const F32 shifted = load(x + i) * set1(inverse) + magic;
    const I32 rounded = std::bit_cast<I32>(shifted) - std::bit_cast<I32>(magic);
    const Narrow narrow = __builtin_convertvector(rounded, Narrow);
    std::memcpy(q + i, &narrow, sizeof narrow);
  }
  return (inverse > 0.0f ? largest / 127.0f : 0.0f) + reduce_add(poison);
}

inline void quantize_super(const float* x, PackedSuper& y) {
  for (int g = 0; g < kGroups; ++g) {
    int8_t q[kGroup];
    const float scale = quantize_group(x + g * kGroup, q);
    int sum[2] = {};
    for (int i = 0; i < kGroup; ++i) sum[i / 16] += q[i];
    for (int half = 0; half < 2; ++half) {
      std::memcpy(y.paired + place<Paired>(g, half), q + 16 * half, 16);
      std::memcpy(y.whole + place<Whole>(g, half), q + 16 * half, 16);
      y.half_scale[2 * g + half] = scale;
      y.half_sum[2 * g + half] = scale * static_cast<float>(sum[half]);
    }
    y.scale[g] = scale;
    y.sum[g] = scale * static_cast<float>(sum[0] + sum[1]);
  }
}

inline void pack_q8(const std::byte* x, Format format, int64_t stride_bytes, int64_t k,
                    std::byte* out) noexcept {
  alignas(64) float buffer[kChunk];
  PackedSuper* y = reinterpret_cast<PackedSuper*>(out);
  for (int64_t i = 0; i < k; i += kChunk, ++y) {
    // Elements that the pack before has: only the last may have some, if it is not the first.
    const int64_t n_known = i > 0 && k - i < kChunk ? kChunk - (k - i) : 0;
    gather(x, format, stride_bytes, i - n_known, smaller(kChunk, k - i + n_known), buffer);
    std::memset(buffer, 0, static_cast<size_t>(n_known) * sizeof(float));
    quantize_super(buffer, *y);
  }
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
