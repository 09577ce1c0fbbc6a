// y[i, n] (+)= sum_k x[i, k] w[n, k] for many rows of x, w in any quantized format.
//
// Each row of w is unpacked once for all rows of x, kSlabRows rows at a time, one per lane (see
// slab_unpack.inc.h); x is packed to bytes with a scale per 32 (PackedSlab). Per group of 32 and
// row of x, four of x's bytes at a time meet four of each row of w:
//     y += scale_x[g] (scale_w[g] (sum of q_w q_x - centre sum of q_x) - min_w[g] sum of q_x)
// The sums of y stay in registers, one lane each: nothing is added across lanes.
// Error: x is off by at most max|x| / 254 within its 32, no other rounding above float32's.
//
// The order of every sum depends on k alone, neither on how many rows of x there are nor on the
// range of n.
#include "backends/cpu/kernels.h"

#include "backends/cpu/kernels/decode_rows.inc.h"
#include "backends/cpu/kernels/slab_blocks.inc.h"
#include "backends/cpu/kernels/slab_rows.inc.h"
#if defined(MLA_ISA_AVX512BF16)
#include "backends/cpu/kernels/slab_pairs.inc.h"
#endif

namespace mla::cpu::MLA_ISA {
namespace {

// ---- activations --------------------------------------------------------------------------------
struct PackedSlab {
  int8_t q[block::kSuper];
  float scale[kSlabGroups];
  int32_t sum[kSlabGroups];  // of q
  int32_t half_sum[2 * kSlabGroups];
};

size_t slab_bytes(int64_t k) noexcept {
  const int64_t bytes =
      round_up(k, block::kSuper) / block::kSuper * static_cast<int64_t>(sizeof(PackedSlab));
  // An odd number of cache lines: rows a power of two apart would fight for the same few sets.
  return static_cast<size_t>((bytes / 64 | 1) * 64);
}

inline float largest_of(F32 v) {  // as a tree: the chain of a loop would be most of the packing
  float lane[kLanes];
  store(lane, v);
#pragma GCC unroll 4
  for (int n = kLanes / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) lane[i] = lane[i] > lane[i + n] ? lane[i] : lane[i + n];
  }
  return lane[0];
}

// 32 floats -> bytes; returns the scale. Infinities and NaNs make poison NaN.
inline float quantize_32(const float* x, int8_t* q, F32& poison) {
  typedef int8_t Narrow __attribute__((vector_size(kLanes)));
  F32 most = zero();
  for (int i = 0; i < kSlabGroup; i += kLanes) {
    const F32 v = load(x + i);
    most = max(most, max(v, zero() - v));
    poison = v * zero() + poison;
  }
  const float largest = largest_of(most);
  // Below this 127 / largest would overflow; such a group counts as zeros.
  const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
  const F32 magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int i = 0; i < kSlabGroup; i += kLanes) {
    const F32 shifted = load(x + i) * set1(inverse) + magic;
    const I32 rounded = std::bit_cast<I32>(shifted) - std::bit_cast<I32>(magic);
    const Narrow narrow = __builtin_convertvector(rounded, Narrow);
    std::memcpy(q + i, &narrow, sizeof narrow);
  }
  return inverse > 0.0f ? largest / 127.0f : 0.0f;
}

inline void add_up(PackedSlab& x) {
  int32_t four[kSlabWords];
  const Bytes ones = Bytes{} + uint8_t{1};
  for (int i = 0; i < kSlabWords; i += kLanes) {
    const FourSums sums = add_fours<false>(begin_fours(I32{}), ones, load_as<Bytes>(x.q + 4 * i));
    const I32 sum = end_fours(I32{}, sums);
    std::memcpy(four + i, &sum, sizeof sum);
  }
  for (int h = 0; h < 2 * kSlabGroups; ++h) {
    x.half_sum[h] = four[4 * h] + four[4 * h + 1] + four[4 * h + 2] + four[4 * h + 3];
  }
  for (int g = 0; g < kSlabGroups; ++g) x.sum[g] = x.half_sum[2 * g] + x.half_sum[2 * g + 1];
}

void pack_slab(const std::byte* x, Format format, int64_t stride_bytes, int64_t k,
               std::byte* out) noexcept {
  alignas(64) float buffer[kChunk];
  PackedSlab* y = reinterpret_cast<PackedSlab*>(out);
  for (int64_t i = 0; i < k; i += kChunk, ++y) {
    gather(x, format, stride_bytes, i, smaller(kChunk, k - i), buffer);
    F32 poison = zero();
    for (int g = 0; g < kSlabGroups; ++g) {
      y->scale[g] = quantize_32(buffer + g * kSlabGroup, y->q + g * kSlabGroup, poison);
    }
    // What is not finite reaches the result through the scales.
    const float spoiled = reduce_add(poison);
    for (int g = 0; g < kSlabGroups; ++g) y->scale[g] += spoiled;
    add_up(*y);
  }
}

// ---- products -----------------------------------------------------------------------------------
// Columns unpacked at a time: 64 KiB of bytes with 32 rows, a sixteenth of a second-level cache.
inline constexpr int64_t kSlabColumns = 2048;

inline constexpr size_t kSlabRoom = kSlabColumns / block::kSuper * sizeof(SlabBlock<block::Q2_K>);

// Rows of x at once: with two registers of rows of w, their sums, and those of a group, fill most
// registers. Two halves need a third set.
template <class B>
inline constexpr int kSlabRowsX = (kLanes == 16 ? 12 : 6) / (Slab<B>::halves + 1);

template <int n_x>
using SlabSums = F32[n_x][kSlabVectors];

// Products of n_words words from `word` on, added to sums.
template <class B, int n_words, int n_x>
MLA_INLINE void add_words(const std::byte* q, const PackedSlab* const* x, int word,
                          I32 (&sums)[n_x][kSlabVectors]) {
  // Sums of pairs have 16 bits where the ISA has no sums of four: as many as these hold.
  constexpr int kFit = 32767 / (2 * 127 * Slab<B>::largest);
  constexpr int kStep = kSumsPairs ? (kFit < n_words ? (kFit < 1 ? 1 : kFit) : n_words) : n_words;
  static_assert(n_words % kStep == 0);
  constexpr bool kSigned = Slab<B>::is_signed;
#pragma GCC unroll 8
  for (int first = 0; first < n_words; first += kStep) {
    FourSums four[n_x][kSlabVectors];
#pragma GCC unroll 8
    for (int i = 0; i < n_x; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kSlabVectors; ++v) four[i][v] = begin_fours(sums[i][v]);
    }
#pragma GCC unroll 8
    for (int j = first; j < first + kStep; ++j) {
      Bytes w[kSlabVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kSlabVectors; ++v) {
        w[v] = load_as<Bytes>(q + (j * kSlabVectors + v) * sizeof(Bytes));
      }
#pragma GCC unroll 8
      for (int i = 0; i < n_x; ++i) {
        const Bytes four_x = (Bytes)(U32{} + load_as<uint32_t>(x[i]->q + 4 * (word + j)));
#pragma GCC unroll 2
        for (int v = 0; v < kSlabVectors; ++v) {
          four[i][v] = add_fours<kSigned>(four[i][v], w[v], four_x);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n_x; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kSlabVectors; ++v) sums[i][v] = end_fours(sums[i][v], four[i][v]);
    }
  }
}

// One group of 32 columns.
template <class B, int n_x>
MLA_INLINE void add_group(const SlabBlock<B>& w, const PackedSlab* const* x, int g,
                          SlabSums<n_x>& y) {
  using S = Slab<B>;
  constexpr int n_words = kSlabGroup / 4 / S::halves;
  F32 group[n_x][kSlabVectors];
#pragma GCC unroll 2
  for (int h = 0; h < S::halves; ++h) {
    const int at = g * S::halves + h;
    I32 sums[n_x][kSlabVectors];
    I32 sum_x[n_x];
#pragma GCC unroll 8
    for (int i = 0; i < n_x; ++i) {
      sum_x[i] = I32{} + (S::halves == 1 ? x[i]->sum[g] : x[i]->half_sum[at]);
#pragma GCC unroll 2
      for (int v = 0; v < kSlabVectors; ++v) sums[i][v] = sum_x[i] * -S::centre;
    }
    const int word = at * n_words;
    add_words<B, n_words>(w.q + word * kSlabVectors * sizeof(Bytes), x, word, sums);
#pragma GCC unroll 2
    for (int v = 0; v < kSlabVectors; ++v) {
      const F32 scale = load(w.scale + (at * kSlabVectors + v) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < n_x; ++i) {
        F32 part = to_f32(sums[i][v]) * scale;
        if constexpr (S::has_min) {
          part = part - load(w.min + (at * kSlabVectors + v) * kLanes) * to_f32(sum_x[i]);
        }
        group[i][v] = h == 0 ? part : group[i][v] + part;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < n_x; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kSlabVectors; ++v) {
      y[i][v] = group[i][v] * set1(x[i]->scale[g]) + y[i][v];
    }
  }
}

// Rows [n, n + n_w) of w, unpacked for columns [begin, begin + size), with rows [first, first +
// n_x) of x. Between runs of columns the sums wait in y.
template <class B, int n_x>
void multiply_slab(const MatmulTile& t, const SlabBlock<B>* slab, int64_t n, int64_t begin,
                   int64_t size, int first) {
  const bool adds = t.accumulate || begin > 0;
  const PackedSlab* x[n_x];
  SlabSums<n_x> y;
#pragma GCC unroll 8
  for (int i = 0; i < n_x; ++i) {
    x[i] = reinterpret_cast<const PackedSlab*>(t.x[first + i]) + begin / block::kSuper;
#pragma GCC unroll 2
    for (int v = 0; v < kSlabVectors; ++v) {
      const int64_t row = n + v * kLanes;
      y[i][v] = adds ? load_lanes(t.y[first + i] + row, t.n_end - row) : zero();
    }
  }
  for (int64_t k = 0; k < size; k += block::kSuper, ++slab) {
    for (int g = 0; g < kSlabGroups; ++g) add_group<B, n_x>(*slab, x, g, y);
#pragma GCC unroll 8
    for (int i = 0; i < n_x; ++i) ++x[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < n_x; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kSlabVectors; ++v) {
      const int64_t row = n + v * kLanes;
      store_lanes(t.y[first + i] + row, t.n_end - row, y[i][v]);
    }
  }
}

template <class B>
void matmul_slab(const MatmulTile& t) noexcept {
  auto* slab = reinterpret_cast<SlabBlock<B>*>(t.room);
  // The next rows of w, here or in the next tile of work, come from memory while these are
  // multiplied. An address past the end does no harm.
  const int64_t slab_bytes = kSlabRows * t.w_row_bytes;
  const int64_t ahead = round_up(slab_bytes / round_up(t.n_x, kSlabRowsX<B>) * kSlabRowsX<B>, 64);
  for (int64_t n = t.n_begin; n < t.n_end; n += kSlabRows) {
    const std::byte* next = t.w + n * t.w_row_bytes + slab_bytes;
    for (int64_t begin = 0; begin < t.k; begin += kSlabColumns) {
      const int64_t size = smaller(kSlabColumns, t.k - begin);
      unpack_slab<B>(t, n, begin, size, slab);
      for_runs<kSlabRowsX<B>>(t.n_x, [&](int first, auto count) {
        if (begin == 0) {
          for (int64_t i = 0; i < ahead; i += 64) __builtin_prefetch(next + i, 0, 2);
          next += ahead;
        }
        multiply_slab<B, count.value>(t, slab, n, begin, size, first);
      });
    }
  }
}

#if defined(MLA_ISA_AVX512AMX)
#define MLA_SLAB_FLOAT(name) {matmul_pairs<Format::name>, pack_bf16, pair_bytes},
#define MLA_SLAB_BLOCKS(name) {matmul_pairs<Format::name>, pack_bf16, pair_bytes},
constexpr size_t kRoom = kPairsRoom;
#elif defined(MLA_ISA_AVX512BF16)
#define MLA_SLAB_FLOAT(name) {matmul_pairs<Format::name>, pack_bf16, pair_bytes},
#define MLA_SLAB_BLOCKS(name) {matmul_slab<block::name>, pack_slab, slab_bytes},
constexpr size_t kRoom = kPairsRoom > kSlabRoom ? kPairsRoom : kSlabRoom;
#else
#define MLA_SLAB_FLOAT(name) {nullptr, nullptr, nullptr},
#define MLA_SLAB_BLOCKS(name) {matmul_slab<block::name>, pack_slab, slab_bytes},
constexpr size_t kRoom = kSlabRoom;
#endif

}  // namespace

extern const SlabTable slab_table;
const SlabTable slab_table = {
    {
#define MLA_FLOAT(name, gguf, elems, bytes) MLA_SLAB_FLOAT(name)
#define MLA_FORMAT(name, gguf, elems, bytes) MLA_SLAB_BLOCKS(name)
#include "quant/formats.def"
        {nullptr, nullptr, nullptr},
    },
    kRoom,
};

}  // namespace mla::cpu::MLA_ISA
