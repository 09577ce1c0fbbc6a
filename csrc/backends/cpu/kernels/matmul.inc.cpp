// y[i, n] (+)= sum_k x[i, k] w[n, k], w in any weight format.
//
// Quantized weights, fast: x is packed to bytes (PackedSuper). Per 256 weights and row of x,
//     y += sum_g scale_w[g] scale_x[g] (sum of q_w q_x over group g) - min_w[g] sum_x[g],
// g over groups of 32, or of 16 where w's scales are: integer dot products, one conversion and FMA
// per register of groups. Error: x is off by at most max|x| / 254 within its 32, no other rounding
// above float32's.
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

// Calls rows(n, n_w, first, Count<n_x>) for groups of up to kRowsTogether rows of w and tiles of
// x, n_x in {8, 4, 2, 1} and up to `most`.
inline constexpr int kRowsTogether = 4;
template <int n>
struct Count {
  static constexpr int value = n;
};
template <int most, class Rows>
inline void for_tiles(const MatmulTile& t, const Rows& rows) {
  for (int64_t n = t.n_begin; n < t.n_end; n += kRowsTogether) {
    const int n_w = static_cast<int>(smaller(kRowsTogether, t.n_end - n));
    int i = 0;
    if constexpr (most == 8) {
      for (; i + 8 <= t.n_x; i += 8) rows(n, n_w, i, Count<8>{});
    }
    for (; i + 4 <= t.n_x; i += 4) rows(n, n_w, i, Count<4>{});
    if (t.n_x - i >= 2) rows(n, n_w, i, Count<2>{}), i += 2;
    if (t.n_x - i >= 1) rows(n, n_w, i, Count<1>{});
  }
}

// Rows n and following of w; those that are not there repeat the last.
template <class T, int n_rows>
inline void find_rows(const MatmulTile& t, int64_t n, const T* (&w)[n_rows]) {
  for (int r = 0; r < n_rows; ++r) {
    w[r] = reinterpret_cast<const T*>(t.w + smaller(n + r, t.n_end - 1) * t.w_row_bytes);
  }
}

inline void finish(const MatmulTile& t, int i, int64_t n, F32 sum) {
  const float total = reduce_add(sum);
  t.y[i][n] = t.accumulate ? t.y[i][n] + total : total;
}

// While a group of kRowsTogether rows is read, piece by piece, as many pieces of the memory that
// follows are asked for: rows are short runs, at whose ends the hardware would lose the thread.
// The group after the next is brought to the second-level cache, the next to the first, where two
// of them take up to 20 of 32 KiB; longer ones come as far as the second.
inline constexpr int64_t kNearBytes = 10 * 1024;
struct Ahead {
  const std::byte* at;
  int64_t group_bytes;

  Ahead(const void* now, int64_t group)
      : at(static_cast<const std::byte*>(now) + group),
        group_bytes(group <= kNearBytes ? group : 0) {}
  MLA_INLINE void ask(int64_t n_bytes) {
    for (int64_t i = 0; i < n_bytes; i += 64) __builtin_prefetch(at + group_bytes + i, 0, 2);
    if (group_bytes != 0) {
      for (int64_t i = 0; i < n_bytes; i += 64) __builtin_prefetch(at + i, 0, 3);
    }
    at += n_bytes;
  }
};

// ---- bytes with bytes ---------------------------------------------------------------------------
struct Sum8 {  // of one row of w with one of x
  F32 dots;
  F32x8 mins;
};

template <class B>
MLA_INLINE void add_super(const WeightsOf<B>& w, const PackedSuper& x, Sum8& sum) {
  if constexpr (kScales<B> == 8) {
    const auto of_x = [&](int i) { return load_as<Bytes>(x.paired + i * sizeof(Bytes)); };
    const F32x8 scale = w.scale * load_f32x8(x.scale);
#pragma GCC unroll 8
    for (int i = 0; i < kParts; i += 2) {
      const I32 dots = dot_pair<kIsSigned<B>>(w.q[i], of_x(i), w.q[i + 1], of_x(i + 1));
      sum.dots = to_f32(dots) * spread(scale, i) + sum.dots;
    }
    if constexpr (kHasMin<B>) {
      const F32x8 sums = load_f32x8(x.sum);
      for (int i = 0; i < kEight; ++i) sum.mins.v[i] = w.min.v[i] * sums.v[i] + sum.mins.v[i];
    }
  } else {
    const F32x16 scale = w.scale * load_f32x16(x.half_scale);
#pragma GCC unroll 16
    for (int i = 0; i < kParts; ++i) {
      const I32 dots = dot<kIsSigned<B>>(w.q[i], load_as<Bytes>(x.whole + i * sizeof(Bytes)));
      sum.dots = to_f32(dots) * spread(scale, i) + sum.dots;
    }
    if constexpr (kHasMin<B>) {
      const F32x16 sums = load_f32x16(x.half_sum);
      for (int i = 0; i < kSixteen; ++i) sum.dots = sum.dots - w.min.v[i] * sums.v[i];
    }
  }
}

// Rows of w whose loads of x are shared: as the sums fit into registers.
template <int n_x>
inline constexpr int kRowsW = n_x == 1   ? 4
                              : n_x == 2 ? 2
                                         : 1;

template <class B, int n_x>
inline void rows_q8(const MatmulTile& t, const B* const* w, int64_t n, int n_w, int first,
                    int64_t ahead) {
  constexpr int64_t kStep = block::kSuper / kBlockElems<B>;  // blocks per 256 weights
  constexpr int kRows = kRowsW<n_x>;
  const int64_t n_steps = (t.k + block::kSuper - 1) / block::kSuper;
  const int64_t last = t.k < block::kSuper ? 0 : (t.k - block::kSuper) / kBlockElems<B>;
  const PackedSuper* x[n_x];
  Sum8 sums[kRows][n_x] = {};
#pragma GCC unroll 8
  for (int i = 0; i < n_x; ++i) x[i] = reinterpret_cast<const PackedSuper*>(t.x[first + i]);
  Ahead next(w[0], ahead);
  for (int64_t s = 0; s < n_steps; ++s) {
    const int64_t at = smaller(s * kStep, last);  // the last 256 may overlap those before
    if (ahead != 0) next.ask(kRows * kStep * static_cast<int64_t>(sizeof(B)));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      WeightsOf<B> unpacked;
      unpack(w[r] + at, unpacked);
#pragma GCC unroll 8
      for (int i = 0; i < n_x; ++i) add_super<B>(unpacked, x[i][s], sums[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < n_x; ++i) {
      if (r < n_w) finish(t, first + i, n + r, sums[r][i].dots - widened(sums[r][i].mins));
    }
  }
}

template <class B, int n_x>
inline void matmul_q8_tile(const MatmulTile& t, int64_t n, int n_w, int first) {
  constexpr int kRows = kRowsW<n_x>;
  for (int r = 0; r < n_w; r += kRows) {
    const B* w[kRows];
    find_rows(t, n + r, w);
    const int64_t ahead = first == 0 ? kRowsTogether * t.w_row_bytes : 0;
    rows_q8<B, n_x>(t, w, n + r, n_w - r, first, ahead);
  }
}

// Rows shorter than 256: padded copies.
template <class B>
__attribute__((noinline)) void matmul_q8_short(const MatmulTile& t) {
  constexpr int64_t kStep = block::kSuper / kBlockElems<B>;
  for (int64_t n = t.n_begin; n < t.n_end; ++n) {
    B padded[kStep] = {};
    std::memcpy(padded, t.w + n * t.w_row_bytes,
                static_cast<size_t>(t.k / kBlockElems<B>) * sizeof(B));
    WeightsOf<B> unpacked;
    unpack(padded, unpacked);
    for (int i = 0; i < t.n_x; ++i) {
      Sum8 sum = {};
      add_super<B>(unpacked, *reinterpret_cast<const PackedSuper*>(t.x[i]), sum);
      finish(t, i, n, sum.dots - widened(sum.mins));
    }
  }
}

template <class B>
void matmul_q8(const MatmulTile& t) noexcept {
  if constexpr (kBlockElems<B> < block::kSuper) {
    if (t.k < block::kSuper) return matmul_q8_short<B>(t);
  }
  for_tiles<8>(t, [&](int64_t n, int n_w, int first, auto count) {
    matmul_q8_tile<B, count.value>(t, n, n_w, first);
  });
}

// ---- floats with floats -------------------------------------------------------------------------
// Two rows of w at a time: each load of x, which comes from the second-level cache, meets both.
inline constexpr int kRowsF32 = 2;
// Rows of x that share one decoded chunk of w; their sums, in memory between chunks, are 8 KiB.
inline constexpr int kPassX = 32;
// Rows of x whose sums are in registers at once: 2 * 2 of each, half of all registers.
inline constexpr int kBlockX = kLanes == 16 ? 4 : 2;

struct Sums {  // of one row of w with one of x: two chains, or latency would be the limit
  F32 even, odd;
};

using PassSums = Sums[kRowsF32][kPassX];

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
  alignas(64) float buffer[kRowsF32][kChunk];
  PassSums sums;
  for (int r = 0; r < n_w; ++r) {
    for (int i = 0; i < n_x; ++i) sums[r][i] = {zero(), zero()};
  }
  for (int64_t begin = 0; begin < t.k; begin += kChunk) {
    const int64_t size = smaller(kChunk, t.k - begin);
    const float* w[kRowsF32];
    for (int r = 0; r < n_w; ++r) {
      const std::byte* row = t.w + (n + r) * t.w_row_bytes;
      w[r] = Decode<format>::chunk(row, begin, size, buffer[r]);
    }
    if (n_w == kRowsF32) {
      add_all_products<kRowsF32>(w, t.x + first, n_x, begin, size, sums);
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
  for (int64_t n = t.n_begin; n < t.n_end; n += kRowsF32) {
    const int n_w = static_cast<int>(smaller(kRowsF32, t.n_end - n));
    for (int i = 0; i < t.n_x; i += kPassX) {
      rows_f32<format>(t, n, n_w, i, static_cast<int>(smaller(kPassX, t.n_x - i)));
    }
  }
}

// ---- numbers as they are, few rows of x ---------------------------------------------------------
// The sums are those of `matmul_f32`, in its order.
template <class W, F32 (*load_w)(const W*)>
struct FloatDot {
  using Weight = W;
  using X = float;
  static constexpr int64_t kStep = kLanes;
  static MLA_INLINE F32 add(F32 sum, const W* w, const float* x) {
    return load_w(w) * load(x) + sum;
  }
};

// Of each row of w with each of x: two chains, or latency would be the limit.
inline constexpr int kMostPlainSums = kLanes == 16 ? 8 : 4;

template <class Dot, int n_x>
inline void rows_plain(const MatmulTile& t, int64_t n, int n_w, int first) {
  using W = typename Dot::Weight;
  using X = typename Dot::X;
  constexpr int64_t kStep = Dot::kStep;
  constexpr int kRows = static_cast<int>(smaller(kMostPlainSums / n_x, kRowsTogether));
  for (int begin = 0; begin < n_w; begin += kRows) {
    const W* w[kRows];
    find_rows(t, n + begin, w);
    const X* x[n_x];
    Sums s[kRows][n_x] = {};
    for (int i = 0; i < n_x; ++i) x[i] = reinterpret_cast<const X*>(t.x[first + i]);
    Ahead next(w[0], kRowsTogether * t.w_row_bytes);
    int64_t j = 0;
    for (; j + 2 * kStep <= t.k; j += 2 * kStep) {
      if (first == 0) next.ask(kRows * 2 * kStep * static_cast<int64_t>(sizeof(W)));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < n_x; ++i) {
          s[r][i].even = Dot::add(s[r][i].even, w[r] + j, x[i] + j);
          s[r][i].odd = Dot::add(s[r][i].odd, w[r] + j + kStep, x[i] + j + kStep);
        }
      }
    }
    for (; j < t.k; j += kStep) {
      for (int r = 0; r < kRows; ++r) {
        W padded[kStep] = {};
        std::memcpy(padded, w[r] + j, static_cast<size_t>(smaller(kStep, t.k - j)) * sizeof(W));
        for (int i = 0; i < n_x; ++i) s[r][i].even = Dot::add(s[r][i].even, padded, x[i] + j);
      }
    }
    for (int r = 0; r < smaller(kRows, n_w - begin); ++r) {
      for (int i = 0; i < n_x; ++i) finish(t, first + i, n + begin + r, s[r][i].even + s[r][i].odd);
    }
  }
}

template <class Dot>
void matmul_plain(const MatmulTile& t) noexcept {
  for_tiles<kMostPlainSums>(t, [&](int64_t n, int n_w, int first, auto count) {
    rows_plain<Dot, count.value>(t, n, n_w, first);
  });
}

template <Format format, class W, F32 (*load_w)(const W*)>
void matmul_floats(const MatmulTile& t) noexcept {
  if (t.n_x <= kMostPlainSums) return matmul_plain<FloatDot<W, load_w>>(t);
  matmul_f32<format>(t);
}
constexpr MatmulEntry kF32 = {Packing::f32, matmul_floats<Format::F32, float, load>};
constexpr MatmulEntry kF16 = {Packing::f32, matmul_floats<Format::F16, uint16_t, load_f16>};
constexpr MatmulEntry kBf16 = {Packing::f32, matmul_floats<Format::BF16, uint16_t, load_bf16>};

#if defined(MLA_ISA_AVX512BF16)
struct Bf16Dot {
  using Weight = uint16_t;
  using X = uint16_t;
  static constexpr int64_t kStep = 2 * kLanes;
  static MLA_INLINE F32 add(F32 sum, const uint16_t* w, const uint16_t* x) {
    return dot_bf16(sum, w, x);
  }
};
constexpr MatmulEntry kBf16Fast = {Packing::bf16, matmul_plain<Bf16Dot>};
#else
constexpr MatmulEntry kBf16Fast = kBf16;
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
        {kF32, kF32},
        {kF16, kF16},
        {kBf16Fast, kBf16},
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
