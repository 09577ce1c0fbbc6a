// y[i, n] (+)= sum_k x[i, k] w[n, k] for many rows of x, both as bf16: for weights of floats, and
// for all where tiles multiply.
//
// w is unpacked for kSlabRows rows and kPairColumns columns at a time to pairs of bf16,
//     [kPairColumns / 2][kSlabVectors][kLanes] words: two neighbours of a row fill one lane.
// On ISAs with products of bf16. With vectors, a pair of x meets all rows at once; the sums of y
// stay in registers, one lane each. With tiles, 16 rows of x and 32 columns meet 16 rows of w.
// Error: x and w are off by at most 2^-9 of themselves, no other rounding above float32's.
#pragma once

#include "backends/cpu/kernels/slab_blocks.inc.h"
#include "backends/cpu/kernels/slab_rows.inc.h"
#if defined(MLA_ISA_AVX512AMX)
#include "backends/cpu/simd/amx.h"
#endif

namespace mla::cpu::MLA_ISA {
namespace {

// 128 KiB with 32 rows, an eighth of the smallest second-level cache.
inline constexpr int64_t kPairColumns = 2048;
inline constexpr int64_t kPairStep = 32;  // pack_bf16 pads rows of x to a multiple
static_assert(kPairStep == kPadBf16 && kChunk % kPairStep == 0);

inline size_t pair_bytes(int64_t k) noexcept { return packed_bytes(Packing::bf16, k); }

struct PairWord {  // columns 2j and 2j + 1
  I32 w[kSlabVectors];
};
inline constexpr size_t kPairRoom = kPairColumns / 2 * sizeof(PairWord);

// ---- weights ------------------------------------------------------------------------------------
// kLanes rows from `row` on, columns [begin, begin + size), size <= kChunk. What is past the end
// counts as zero, up to a multiple of kPairStep columns.
template <Format format>
void unpack_pairs(const MatmulTile& t, int64_t row, int64_t begin, int64_t size, int v,
                  PairWord* out) {
  const auto turn = [&](const std::byte* p, int64_t stride, int64_t n_columns) {
    for (int64_t j = 0; j < n_columns; j += 8) {
      const Words words = words_of_rows(p + 2 * j, stride);
      for (int i = 0; i < 4; ++i) out[j / 2 + i].w[v] = (I32)words.w[i];
    }
  };
  if (format == Format::BF16 && row + kLanes <= t.n_end && size % kPairStep == 0) {
    return turn(t.w + row * t.w_row_bytes + 2 * begin, t.w_row_bytes, size);
  }
  alignas(64) uint16_t staged[kLanes][kChunk];
  alignas(64) float buffer[kChunk];
  const int64_t width = round_up(size, kPairStep);
  for (int64_t r = 0; r < kLanes; ++r) {
    const float* x = nullptr;
    if (row + r < t.n_end) {
      x = Decode<format>::chunk(t.w + (row + r) * t.w_row_bytes, begin, size, buffer);
      if (size % kPairStep != 0) {  // zeros end with a register
        if (x != buffer) std::memcpy(buffer, x, static_cast<size_t>(size) * sizeof(float));
        for (int64_t j = size; j < width; ++j) buffer[j] = 0.0f;
        x = buffer;
      }
    }
    for (int64_t j = 0; j < width; j += 2 * kLanes) {
      const I32 pairs = x == nullptr ? I32{} : join_pairs(load(x + j), load(x + j + kLanes));
      std::memcpy(staged[r] + j, &pairs, sizeof pairs);
    }
  }
  turn(reinterpret_cast<const std::byte*>(staged), sizeof staged[0], width);
}

template <Format format>
struct PairSlab {  // of floats
  // Rows [n, n + kSlabRows) of t's weight, columns [begin, begin + size).
  static void unpack(const MatmulTile& t, int64_t n, int64_t begin, int64_t size, PairWord* out) {
    for (int64_t k = 0; k < size; k += kChunk) {
      const int64_t n_columns = smaller(kChunk, size - k);
      for (int v = 0; v < kSlabVectors; ++v) {
        unpack_pairs<format>(t, n + v * kLanes, begin + k, n_columns, v, out + k / 2);
      }
    }
  }
};

// Four weights in the bytes of each lane of q.
MLA_INLINE void put_pairs(U32 q, F32 scale, F32 min, PairWord* out, int v) {
  F32 w[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) w[i] = byte_of(q, i) * scale - min;
  out[0].w[v] = zip_pairs(w[0], w[1]);
  out[1].w[v] = zip_pairs(w[2], w[3]);
}

template <class B>
void unpack_pair_blocks(const MatmulTile& t, int64_t n, int64_t begin, int64_t size,
                        PairWord* out) {
  using S = Slab<B>;
  static_assert(!S::is_signed);
  constexpr int kWords = kSlabGroup / 4 / S::halves;
  for (int64_t k = 0; k < size; k += block::kSuper) {
    SlabBlock<B> in;
    unpack_slab(t, n, begin + k, smaller(block::kSuper, size - k), &in);
    for (int at = 0; at < SlabBlock<B>::kScales; ++at) {
#pragma GCC unroll 2
      for (int v = 0; v < kSlabVectors; ++v) {
        const F32 scale = load(in.scale + (at * kSlabVectors + v) * kLanes);
        F32 min = set1(static_cast<float>(S::centre)) * scale;
        if constexpr (S::has_min) min = load(in.min + (at * kSlabVectors + v) * kLanes);
        for (int word = at * kWords; word < (at + 1) * kWords; ++word) {
          const U32 q = load_as<U32>(in.q + (word * kSlabVectors + v) * sizeof(Bytes));
          put_pairs(q, scale, min, out + k / 2 + 2 * word, v);
        }
      }
    }
  }
}
#define MLA_FORMAT(name, gguf, elems, bytes)                                        \
  template <>                                                                       \
  struct PairSlab<Format::name> {                                                   \
    static void unpack(const MatmulTile& t, int64_t n, int64_t begin, int64_t size, \
                       PairWord* out) {                                             \
      unpack_pair_blocks<block::name>(t, n, begin, size, out);                      \
    }                                                                               \
  };
#include "quant/formats.def"

#if defined(MLA_ISA_AVX512AMX)
// ---- tiles --------------------------------------------------------------------------------------
inline constexpr int kTileRows = 16;
// Rows of x, made contiguous; an odd number of cache lines apart.
inline constexpr int64_t kCopyBytes = kPairColumns * 2 + 64;

struct RowsX {
  const std::byte* first;
  int64_t stride;
};

// Columns [begin, begin + size) of t's rows of x at equal distances: in place, or copied to room.
inline RowsX lined_up(const MatmulTile& t, int64_t begin, int64_t size, std::byte* room) {
  const int64_t stride = t.n_x > 1 ? t.x[1] - t.x[0] : 0;
  bool even = true;
  for (int i = 1; i < t.n_x; ++i) even = even && t.x[i] - t.x[i - 1] == stride;
  if (even) return {t.x[0] + 2 * begin, stride};
  const auto n_bytes = static_cast<size_t>(2 * round_up(size, kPairStep));
  for (int i = 0; i < t.n_x; ++i) std::memcpy(room + i * kCopyBytes, t.x[i] + 2 * begin, n_bytes);
  return {room, kCopyBytes};
}

// Up to 2 * kTileRows rows of x from `first` on, with all rows of the slab: tiles 0 to 3 are the
// sums, 4 and 5 of x, 6 and 7 of w.
template <bool two>
void multiply_tiles(const MatmulTile& t, Tiles& tiles, const PairWord* slab, const RowsX& x,
                    int64_t n, int64_t begin, int64_t size, int first, int n_rows) {
  alignas(64) float sums[2 * kTileRows][kSlabRows];
  const std::byte* x0 = x.first + first * x.stride;
  const std::byte* x1 = x0 + kTileRows * x.stride;
  tiles.zero<0>();
  tiles.zero<1>();
  if constexpr (two) tiles.zero<2>(), tiles.zero<3>();
  for (int64_t k = 0; k < size; k += kPairStep) {
    const I32* w = slab[k / 2].w;
    tiles.load<6>(w, sizeof(PairWord));
    tiles.load<4>(x0 + 2 * k, x.stride);
    tiles.multiply<0, 4, 6>();
    tiles.load<7>(w + 1, sizeof(PairWord));
    tiles.multiply<1, 4, 7>();
    if constexpr (two) {
      tiles.load<5>(x1 + 2 * k, x.stride);
      tiles.multiply<2, 5, 6>();
      tiles.multiply<3, 5, 7>();
    }
  }
  tiles.store<0>(sums[0], sizeof sums[0]);
  tiles.store<1>(sums[0] + kLanes, sizeof sums[0]);
  if constexpr (two) {
    tiles.store<2>(sums[kTileRows], sizeof sums[0]);
    tiles.store<3>(sums[kTileRows] + kLanes, sizeof sums[0]);
  }
  const bool adds = t.accumulate || begin > 0;
  for (int i = 0; i < n_rows; ++i) {
    for (int v = 0; v < kSlabVectors; ++v) {
      const int64_t row = n + v * kLanes;
      float* y = t.y[first + i] + row;
      const F32 sum = load(sums[i] + v * kLanes);
      store_lanes(y, t.n_end - row, adds ? load_lanes(y, t.n_end - row) + sum : sum);
    }
  }
}

// All rows of x with the slab.
inline void multiply_rows(const MatmulTile& t, Tiles& tiles, const PairWord* slab, const RowsX& x,
                          int64_t n, int64_t begin, int64_t size) {
  for (int i = 0; i < t.n_x; i += 2 * kTileRows) {
    const int n_rows = static_cast<int>(smaller(2 * kTileRows, t.n_x - i));
    const bool two = n_rows > kTileRows;
    tiles.shape(two ? kTileRows : n_rows, two ? n_rows - kTileRows : 1);
    if (two) {
      multiply_tiles<true>(t, tiles, slab, x, n, begin, size, i, n_rows);
    } else {
      multiply_tiles<false>(t, tiles, slab, x, n, begin, size, i, n_rows);
    }
  }
}

inline constexpr size_t kPairsRoom = kPairRoom + kSlabMaxRows * kCopyBytes;

template <Format format>
void matmul_pairs(const MatmulTile& t) noexcept {
  auto* slab = reinterpret_cast<PairWord*>(t.room);
  Tiles tiles;
  for (int64_t begin = 0; begin < t.k; begin += kPairColumns) {
    const int64_t size = smaller(kPairColumns, t.k - begin);
    const RowsX x = lined_up(t, begin, size, t.room + kPairRoom);
    for (int64_t n = t.n_begin; n < t.n_end; n += kSlabRows) {
      PairSlab<format>::unpack(t, n, begin, size, slab);
      multiply_rows(t, tiles, slab, x, n, begin, size);
    }
  }
}
#else
// ---- vectors ------------------------------------------------------------------------------------
// Rows of x at once: their sums fill 24 of 32 registers.
inline constexpr int kPairRowsX = 12;
inline constexpr size_t kPairsRoom = kPairRoom;

template <int n_x>
void multiply_pairs(const MatmulTile& t, const PairWord* slab, int64_t n, int64_t begin,
                    int64_t size, int first) {
  const bool adds = t.accumulate || begin > 0;
  const std::byte* x[n_x];
  F32 y[n_x][kSlabVectors];
#pragma GCC unroll 12
  for (int i = 0; i < n_x; ++i) {
    x[i] = t.x[first + i] + 2 * begin;
#pragma GCC unroll 2
    for (int v = 0; v < kSlabVectors; ++v) {
      const int64_t row = n + v * kLanes;
      y[i][v] = adds ? load_lanes(t.y[first + i] + row, t.n_end - row) : zero();
    }
  }
  for (int64_t j = 0; j < round_up(size, kPairStep) / 2; ++j) {
    const PairWord w = slab[j];
#pragma GCC unroll 12
    for (int i = 0; i < n_x; ++i) {
      const I32 pair = I32{} + load_as<int32_t>(x[i] + 4 * j);
#pragma GCC unroll 2
      for (int v = 0; v < kSlabVectors; ++v) y[i][v] = dot_pairs(y[i][v], w.w[v], pair);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < n_x; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kSlabVectors; ++v) {
      const int64_t row = n + v * kLanes;
      store_lanes(t.y[first + i] + row, t.n_end - row, y[i][v]);
    }
  }
}

template <Format format>
void matmul_pairs(const MatmulTile& t) noexcept {
  auto* slab = reinterpret_cast<PairWord*>(t.room);
  for (int64_t n = t.n_begin; n < t.n_end; n += kSlabRows) {
    for (int64_t begin = 0; begin < t.k; begin += kPairColumns) {
      const int64_t size = smaller(kPairColumns, t.k - begin);
      PairSlab<format>::unpack(t, n, begin, size, slab);
      for_runs<kPairRowsX>(t.n_x, [&](int first, auto count) {
        multiply_pairs<count.value>(t, slab, n, begin, size, first);
      });
    }
  }
}
#endif

}  // namespace
}  // namespace mla::cpu::MLA_ISA
