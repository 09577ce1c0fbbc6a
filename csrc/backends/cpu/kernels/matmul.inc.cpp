// y[i, n] (+)= sum_k x[i, k] w[n, k], w in any weight format.
//
// Quantized weights, fast: x is packed to bytes (PackedSuper). Per 256 weights and row of x,
//     y += sum_g scale_w[g] scale_x[g] (sum of q_w q_x over group g) - min_w[g] sum_x[g],
// g over the 16 groups of 16: integer dot products, one conversion and FMA per register of bytes.
// Error: x is off by at most max|x| / 254 within its 16, no other rounding above float32's.
//
// All else: 256 weights are decoded to floats, which stay in the first-level cache, and meet
// float32 rows of x. Error: that of a float32 sum in 2 * kLanes parts.
//
// Unpacked weights meet many rows of x: 8 of bytes, whose sums stay in registers, or kPassX of
// floats. The order of every sum depends on k alone, neither on how many rows of x there are nor on
// the range of n.
#include "backends/cpu/kernels.h"

#include "backends/cpu/kernels/decode_rows.inc.h"
#include "backends/cpu/simd/simd.h"

namespace mla::cpu::MLA_ISA {
namespace {

inline constexpr int64_t kPrefetchBytes = 1024;

inline void prefetch(const std::byte* p, int64_t n_bytes) {
  for (int64_t i = 0; i < n_bytes; i += 64) __builtin_prefetch(p + i + kPrefetchBytes);
}

inline void finish(const MatmulTile& t, int i, int64_t n, F32 sum) {
  const float total = reduce_add(sum);
  t.y[i][n] = t.accumulate ? t.y[i][n] + total : total;
}

// Calls row(n, first, Count<n_x>) for every row of w and tile of x, n_x in {8, 4, 2, 1}.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <class Row>
inline void for_tiles(const MatmulTile& t, const Row& row) {
  for (int64_t n = t.n_begin; n < t.n_end; ++n) {
    int i = 0;
    for (; i + 8 <= t.n_x; i += 8) row(n, i, Count<8>{});
    if (t.n_x - i >= 4) row(n, i, Count<4>{}), i += 4;
    if (t.n_x - i >= 2) row(n, i, Count<2>{}), i += 2;
    if (t.n_x - i >= 1) row(n, i, Count<1>{});
  }
}

// ---- bytes with bytes ---------------------------------------------------------------------------
template <class B>
MLA_INLINE F32 dot_super(const Weights& w, const PackedSuper& x, F32 acc) {
  const F32x16 scale = w.scale * load_f32x16(x.scale);
  F32 odd = zero();  // two chains, or the latency of the FMAs would be the limit
#pragma GCC unroll 16
  for (int p = 0; p < kParts; p += 2) {
    const I32 d0 = dot<kIsSigned<B>>(w.q[p], load_as<Bytes>(x.q + p * sizeof(Bytes)));
    const I32 d1 = dot<kIsSigned<B>>(w.q[p + 1], load_as<Bytes>(x.q + (p + 1) * sizeof(Bytes)));
    acc = to_f32(d0) * spread(scale, p) + acc;
    odd = to_f32(d1) * spread(scale, p + 1) + odd;
  }
  if constexpr (kHasMin<B>) {
    for (int i = 0; i < kSixteen; ++i) odd = odd - w.min.v[i] * load(x.sum + i * kLanes);
  }
  return acc + odd;
}

template <class B, int n_x>
inline void row_q8(const MatmulTile& t, int64_t n, int first) {
  const std::byte* row = t.w + n * t.w_row_bytes;
  const B* b = reinterpret_cast<const B*>(row);
  constexpr int64_t kStep = block::kSuper / kBlockElems<B>;  // blocks per 256 weights
  const int64_t n_full = t.k / block::kSuper;
  const PackedSuper* x[n_x];
  F32 acc[n_x];
#pragma GCC unroll 8
  for (int i = 0; i < n_x; ++i) {
    x[i] = reinterpret_cast<const PackedSuper*>(t.x[first + i]);
    acc[i] = zero();
  }
  Weights w;
  for (int64_t s = 0; s < n_full; ++s, b += kStep) {
    prefetch(reinterpret_cast<const std::byte*>(b), kStep * sizeof(B));
    unpack(b, w);
#pragma GCC unroll 8
    for (int i = 0; i < n_x; ++i) acc[i] = dot_super<B>(w, x[i][s], acc[i]);
  }
  if constexpr (kBlockElems<B> < block::kSuper) {
    if (t.k % block::kSuper != 0) {
      unpack_tail(b, t.k % block::kSuper, w);
#pragma GCC unroll 8
      for (int i = 0; i < n_x; ++i) acc[i] = dot_super<B>(w, x[i][n_full], acc[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < n_x; ++i) finish(t, first + i, n, acc[i]);
}

template <class B>
void matmul_q8(const MatmulTile& t) noexcept {
  for_tiles(t, [&](int64_t n, int first, auto count) { row_q8<B, count.value>(t, n, first); });
}

// ---- floats with floats -------------------------------------------------------------------------
// Two rows of w at a time: each load of x, which comes from the second-level cache, meets both.
inline constexpr int kRowsW = 2;
// Rows of x that share one decoded chunk of w; their sums, in memory between chunks, are 8 KiB.
inline constexpr int kPassX = 32;
// Rows of x whose sums are in registers at once: 2 * 2 of each, half of all registers.
inline constexpr int kBlockX = kLanes == 16 ? 4 : 2;

struct Sums {  // of one row of w with one of x: two chains, or latency would be the limit
  F32 even, odd;
};

using PassSums = Sums[kRowsW][kPassX];

template <int n_w, int n_x>
void add_products(const float* const* w, const std::byte* const* x, int first, int64_t begin,
                  int64_t size, PassSums& sums) {
  const float* xs[n_x];
  Sums s[n_w][n_x];
#pragma GCC unroll 4
  for (int i = 0; i < n_x; ++i) {
    xs[i] = reinterpret_cast<const float*>(x[first + i]) + begin;
#pragma GCC unroll 2
    for (int r = 0; r < n_w; ++r) s[r][i] = sums[r][first + i];
  }
  int64_t j = 0;
  for (; j + 2 * kLanes <= size; j += 2 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < n_x; ++i) {
      const F32 x0 = load(xs[i] + j), x1 = load(xs[i] + j + kLanes);
#pragma GCC unroll 2
      for (int r = 0; r < n_w; ++r) {
        s[r][i].even = load(w[r] + j) * x0 + s[r][i].even;
        s[r][i].odd = load(w[r] + j + kLanes) * x1 + s[r][i].odd;
      }
    }
  }
  for (; j < size; j += kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < n_x; ++i) {
#pragma GCC unroll 2
      for (int r = 0; r < n_w; ++r) {
        s[r][i].even = load(w[r] + j) * load(xs[i] + j) + s[r][i].even;
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < n_x; ++i) {
#pragma GCC unroll 2
    for (int r = 0; r < n_w; ++r) sums[r][first + i] = s[r][i];
  }
}

template <int n_w>
void add_all_products(const float* const* w, const std::byte* const* x, int n_x, int64_t begin,
                      int64_t size, PassSums& sums) {
  int i = 0;
  for (; i + kBlockX <= n_x; i += kBlockX) {
    add_products<n_w, kBlockX>(w, x, i, begin, size, sums);
  }
  for (; i < n_x; ++i) add_products<n_w, 1>(w, x, i, begin, size, sums);
}

// Rows [n, n + n_w) of w with rows [first, first + n_x) of x.
template <Format format>
void rows_f32(const MatmulTile& t, int64_t n, int n_w, int first, int n_x) {
  alignas(64) float buffer[kRowsW][kChunk];
  PassSums sums;
  for (int r = 0; r < n_w; ++r) {
    for (int i = 0; i < n_x; ++i) sums[r][i] = {zero(), zero()};
  }
  for (int64_t begin = 0; begin < t.k; begin += kChunk) {
    const int64_t size = smaller(kChunk, t.k - begin);
    const float* w[kRowsW];
    for (int r = 0; r < n_w; ++r) {
      const std::byte* row = t.w + (n + r) * t.w_row_bytes;
      w[r] = Decode<format>::chunk(row, begin, size, buffer[r]);
    }
    if (n_w == kRowsW) {
      add_all_products<kRowsW>(w, t.x + first, n_x, begin, size, sums);
    } else {
      add_all_products<1>(w, t.x + first, n_x, begin, size, sums);
    }
  }
  for (int r = 0; r < n_w; ++r) {
    for (int i = 0; i < n_x; ++i) finish(t, first + i, n + r, sums[r][i].even + sums[r][i].odd);
  }
}

template <Format format>
void matmul_f32(const MatmulTile& t) noexcept {
  for (int64_t n = t.n_begin; n < t.n_end; n += kRowsW) {
    const int n_w = static_cast<int>(smaller(kRowsW, t.n_end - n));
    for (int i = 0; i < t.n_x; i += kPassX) {
      rows_f32<format>(t, n, n_w, i, static_cast<int>(smaller(kPassX, t.n_x - i)));
    }
  }
}

// ---- bf16 with bf16 -----------------------------------------------------------------------------
#if defined(MLA_ISA_AVX512BF16)
template <int n_x>
inline void row_bf16(const MatmulTile& t, int64_t n, int first) {
  const uint16_t* w = reinterpret_cast<const uint16_t*>(t.w + n * t.w_row_bytes);
  const uint16_t* x[n_x];
  F32 even[n_x], odd[n_x];
#pragma GCC unroll 8
  for (int i = 0; i < n_x; ++i) {
    x[i] = reinterpret_cast<const uint16_t*>(t.x[first + i]);
    even[i] = odd[i] = zero();
  }
  constexpr int64_t kStep = 2 * kLanes;
  int64_t j = 0;
  for (; j + 2 * kStep <= t.k; j += 2 * kStep) {
#pragma GCC unroll 8
    for (int i = 0; i < n_x; ++i) {
      even[i] = dot_bf16(even[i], w + j, x[i] + j);
      odd[i] = dot_bf16(odd[i], w + j + kStep, x[i] + j + kStep);
    }
  }
  for (; j < t.k; j += kStep) {
    uint16_t padded[kStep] = {};
    std::memcpy(padded, w + j, static_cast<size_t>(smaller(kStep, t.k - j)) * sizeof(uint16_t));
#pragma GCC unroll 8
    for (int i = 0; i < n_x; ++i) even[i] = dot_bf16(even[i], padded, x[i] + j);
  }
#pragma GCC unroll 8
  for (int i = 0; i < n_x; ++i) finish(t, first + i, n, even[i] + odd[i]);
}

void matmul_bf16(const MatmulTile& t) noexcept {
  for_tiles(t, [&](int64_t n, int first, auto count) { row_bf16<count.value>(t, n, first); });
}
constexpr MatmulEntry kBf16Fast = {Packing::bf16, matmul_bf16};
#else
constexpr MatmulEntry kBf16Fast = {Packing::f32, matmul_f32<Format::BF16>};
#endif

// ---- w [K, N]: y[i, n] (+)= sum_k x[i, k] w[k, n] -----------------------------------------------
// kRowsAcross rows of w are decoded for 256 columns, then added to the sums of all rows of x: one
// load and store of a sum per kRowsAcross products. Sums run in the order of k.
inline constexpr int kRowsAcross = 4;

template <Format format, int n_x>
inline void columns(const MatmulTile& t, int64_t begin, int64_t size, int first) {
  alignas(64) float buffer[kRowsAcross][kChunk];
  alignas(64) float sums[n_x][kChunk] = {};
  static const float kNothing[kChunk] = {};
  const int64_t width = round_up(size, kLanes);
  for (int64_t k = 0; k < t.k; k += kRowsAcross) {
    const float* w[kRowsAcross];
    float x[n_x][kRowsAcross];
    for (int r = 0; r < kRowsAcross; ++r) {
      const bool inside = k + r < t.k;
      w[r] = inside ? Decode<format>::chunk(t.w + (k + r) * t.w_row_bytes, begin, size, buffer[r])
                    : kNothing;
#pragma GCC unroll 8
      for (int i = 0; i < n_x; ++i) {
        x[i][r] = inside ? reinterpret_cast<const float*>(t.x[first + i])[k + r] : 0.0f;
      }
    }
    for (int64_t j = 0; j < width; j += kLanes) {
      F32 row[kRowsAcross];
      for (int r = 0; r < kRowsAcross; ++r) row[r] = load(w[r] + j);
#pragma GCC unroll 8
      for (int i = 0; i < n_x; ++i) {
        F32 sum = load(sums[i] + j);
        for (int r = 0; r < kRowsAcross; ++r) sum = row[r] * set1(x[i][r]) + sum;
        store(sums[i] + j, sum);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < n_x; ++i) {
    float* y = t.y[first + i] + begin;
    for (int64_t j = 0; j < size; ++j) y[j] = t.accumulate ? y[j] + sums[i][j] : sums[i][j];
  }
}

template <Format format>
void matmul_across(const MatmulTile& t) noexcept {
  for (int64_t begin = t.n_begin; begin < t.n_end; begin += kChunk) {
    const int64_t size = smaller(kChunk, t.n_end - begin);
    int i = 0;
    for (; i + 4 <= t.n_x; i += 4) columns<format, 4>(t, begin, size, i);
    for (; i < t.n_x; ++i) columns<format, 1>(t, begin, size, i);
  }
}

constexpr MatmulEntry kNone = {Packing::f32, nullptr};

}  // namespace

extern const MatmulTable matmul_table;
const MatmulTable matmul_table = {
    {
        {{Packing::f32, matmul_f32<Format::F32>}, {Packing::f32, matmul_f32<Format::F32>}},
        {{Packing::f32, matmul_f32<Format::F16>}, {Packing::f32, matmul_f32<Format::F16>}},
        {kBf16Fast, {Packing::f32, matmul_f32<Format::BF16>}},
#define MLA_FORMAT(name, gguf, elems, bytes) \
  {{Packing::q8, matmul_q8<block::name>}, {Packing::f32, matmul_f32<Format::name>}},
#include "quant/formats.def"
        {kNone, kNone},
    },
    {
#define MLA_FLOAT(name, gguf, elems, bytes) matmul_across<Format::name>,
#define MLA_FORMAT(name, gguf, elems, bytes) matmul_across<Format::name>,
#include "quant/formats.def"
        nullptr,
    },
    {pack_f32, pack_bf16, pack_q8},
    packed_bytes,
    decode,
};

}  // namespace mla::cpu::MLA_ISA
