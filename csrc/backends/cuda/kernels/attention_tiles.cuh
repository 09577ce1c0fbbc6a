// Tiles of the latent cache in shared memory.
//
// A tile is 32 or 64 rows of kKeyDims numbers (latent, then rope), 72 chunks of 16 bytes. Chunk c
// of row r lies at place c ^ (r % 8) of its row: the 8 rows that ldmatrix reads at a time are then
// in 8 different groups of banks, and so are the chunks that are written side by side.
// Keys are rows of the tile, values the first 512 columns of the same rows.
//
// F16 and BF16 rows are copied as they are, asynchronously, ahead of their use. Q8_0 rows are
// copied raw and become halves (d * q, rounded once) just before their use; where shared memory has
// no room for the raw rows, they are read from the cache at that point.
#pragma once

#include "backends/cuda/kernels/attention_operand.cuh"
#include "backends/cuda/kernels/attention_schedule.cuh"

namespace mla::cuda {

inline constexpr int kTileThreads = 256;
inline constexpr int kTileWarps = kTileThreads / 32;
inline constexpr int kWarpColumns = kLatentDims / kTileWarps;  // 64 of the output
inline constexpr int kSteps = kKeyDims / 16;                   // products along the dims of a score
inline constexpr int kChunk = 16;                              // bytes
inline constexpr int kChunkElems = kChunk / 2;
inline constexpr int kRowChunks = kKeyDims / kChunkElems;
inline constexpr int kLatentChunks = kLatentDims / kChunkElems;
inline constexpr int kRopeChunks = kRopeDims / kChunkElems;
inline constexpr int kRowBytes = kRowChunks * kChunk;  // 1,152
static_assert(kRowChunks % 8 == 0, "the swizzle stays within a row");

// Raw Q8_0 rows: 16 blocks of 34 bytes, then the rope part.
inline constexpr int kRawLatentChunks = kLatentDims / 32 * kQ8Bytes / kChunk;  // 34
inline constexpr int kRawRowBytes = (kRawLatentChunks + kRopeChunks) * kChunk;

// Eight neighbouring threads copy a row: 128 bytes at a time.
inline constexpr int kRowThreads = 8;
inline constexpr int kPassRows = kTileThreads / kRowThreads;

// The chunk number is a sum of two that share no bits: what the lane decides, and what is known
// when the code is compiled. The latter then costs one exclusive or for each of 4 places, and an
// offset.
__device__ __forceinline__ std::byte* chunk_at(std::byte* rows, int row, int chunk, int fixed = 0) {
  const int place = (chunk ^ (row & 7)) ^ (fixed & 7);
  return rows + row * (kRowChunks * kChunk) + place * kChunk + fixed / 8 * (8 * kChunk);
}

// Where this thread's rows of one tile are in the cache; -1 behind the last cell.
template <int kCells>
struct TileRows {
  static constexpr int kPasses = kCells / kPassRows;
  int row[kPasses];
};
template <int kCells>
__device__ inline TileRows<kCells> find_rows(const AttentionArgs& a, const Span& span, int tile) {
  TileRows<kCells> rows;
#pragma unroll
  for (int pass = 0; pass < rows.kPasses; ++pass) {
    const int cell = tile * kCells + pass * kPassRows + static_cast<int>(threadIdx.x) / kRowThreads;
    rows.row[pass] = cell < span.n_cells ? static_cast<int>(cache_row(a, span, cell)) : -1;
  }
  return rows;
}

// A plane's part of a row: kChunks places from `to` on, of which the model fills n_bytes (a
// multiple of 4, and of 16 with kBy16); the rest, and all of it where `from` is null, becomes
// zeros. swizzle: what the numbers of places are combined with, see chunk_at.
template <int kChunks, bool kBy16>
__device__ __forceinline__ void copy_part(const std::byte* from, int n_bytes, std::byte* to,
                                          int swizzle) {
  const int first = static_cast<int>(threadIdx.x) % kRowThreads;
  const int filled = from != nullptr ? n_bytes : 0;
  std::byte* place = to + (first ^ swizzle) * kChunk;
  if constexpr (kBy16) {
#pragma unroll
    for (int i = 0; i < (kChunks + kRowThreads - 1) / kRowThreads; ++i) {
      const int at = (first + i * kRowThreads) * kChunk;
      if (kChunks % kRowThreads != 0 && at >= kChunks * kChunk) continue;
      cp_async16(place + i * (kRowThreads * kChunk), from + at, at < filled);
    }
  } else {
#pragma unroll 1
    for (int at = first * kChunk; at < kChunks * kChunk; at += kRowThreads * kChunk) {
      for (int i = 0; i < kChunk; i += 4) cp_async4(place + i, from + at + i, at + i < filled);
      place += kRowThreads * kChunk;
    }
  }
}

__device__ inline void zero_chunk(std::byte* to) {
  *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
}

// Rows of 16-bit numbers straight into a tile. The caller commits.
template <bool kBy16, int kCells>
__device__ inline void copy_tile(const AttentionArgs& a, const TileRows<kCells>& rows,
                                 std::byte* tile) {
#pragma unroll
  for (int pass = 0; pass < rows.kPasses; ++pass) {
    const int r = pass * kPassRows + static_cast<int>(threadIdx.x) / kRowThreads;
    const int row = rows.row[pass];
    const bool has = row >= 0;
    std::byte* to = tile + r * (kRowChunks * kChunk);
    copy_part<kLatentChunks, kBy16>(has ? cell_at(a.latent, row) : nullptr, 2 * a.c, to, r & 7);
    copy_part<kRopeChunks, kBy16>(has ? cell_at(a.rope, row) : nullptr, 2 * a.r,
                                  to + kLatentChunks * kChunk, r & 7);
  }
}

// Rows that will be copied: into L2 already, whoever writes the last of them. Addresses alone
// matter.
template <int kCells>
__device__ inline void prefetch_rows(const AttentionArgs& a, const TileRows<kCells>& rows,
                                     int latent_bytes) {
  constexpr int kLine = 128;
#pragma unroll
  for (int pass = 0; pass < rows.kPasses; ++pass) {
    if (rows.row[pass] < 0) continue;
    const int first = static_cast<int>(threadIdx.x) % kRowThreads;
    const std::byte* latent = cell_at(a.latent, rows.row[pass]);
    for (int at = first * kLine; at < latent_bytes; at += kRowThreads * kLine) {
      prefetch_l2(latent + at);
    }
    if (first == 0) prefetch_l2(cell_at(a.rope, rows.row[pass]));
  }
}

// Q8_0 rows and their rope parts, raw.
template <bool kBy16, int kCells>
__device__ inline void copy_raw(const AttentionArgs& a, const TileRows<kCells>& rows,
                                std::byte* raw) {
#pragma unroll
  for (int pass = 0; pass < rows.kPasses; ++pass) {
    const int r = pass * kPassRows + static_cast<int>(threadIdx.x) / kRowThreads;
    const int row = rows.row[pass];
    const bool has = row >= 0;
    std::byte* to = raw + r * kRawRowBytes;
    copy_part<kRawLatentChunks, kBy16>(has ? cell_at(a.latent, row) : nullptr, a.c / 32 * kQ8Bytes,
                                       to, 0);
    copy_part<kRopeChunks, kBy16>(has ? cell_at(a.rope, row) : nullptr, 2 * a.r,
                                  to + kRawLatentChunks * kChunk, 0);
  }
}

// Four signed bytes times d, each rounded once. A half of bits 0x6400 + u is 1024 + u: the bytes,
// their signs turned to an offset of 128, become halves by being put beside 0x64.
__device__ inline uint2 q8_to_halves(uint32_t bytes, __half2 d) {
  constexpr uint32_t kOffsets = 0x64006400u + 0x00800080u;  // 1024 + 128
  const uint32_t u = bytes ^ 0x80808080u;
  const uint32_t lo = __byte_perm(u, 0x64646464u, 0x5140), hi = __byte_perm(u, 0x64646464u, 0x7362);
  const __half2 offset = *reinterpret_cast<const __half2*>(&kOffsets);
  const __half2 a = __hmul2(__hsub2(*reinterpret_cast<const __half2*>(&lo), offset), d);
  const __half2 b = __hmul2(__hsub2(*reinterpret_cast<const __half2*>(&hi), offset), d);
  return {*reinterpret_cast<const uint32_t*>(&a), *reinterpret_cast<const uint32_t*>(&b)};
}

// 16 words of two blocks' integers to 8 chunks of row r, the first being number `chunk`.
__device__ inline void q8_words_to_tile(const uint32_t (&q)[16], __half2 d0, __half2 d1,
                                        std::byte* tile, int r, int chunk) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const __half2 d = i < 4 ? d0 : d1;
    const uint2 lo = q8_to_halves(q[2 * i], d), hi = q8_to_halves(q[2 * i + 1], d);
    *reinterpret_cast<uint4*>(chunk_at(tile, r, chunk + i)) = make_uint4(lo.x, lo.y, hi.x, hi.y);
  }
}
__device__ inline __half2 low_half_twice(uint32_t word) {
  return __half2half2(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
}

// 68 bytes, two blocks, at a multiple of 4: in the first block integers lie across words.
__device__ inline void q8_pair_to_tile(const std::byte* pair, std::byte* tile, int r, int index) {
  const auto* words = reinterpret_cast<const uint32_t*>(pair);
  uint32_t q[16];
  uint32_t word = words[0];
  const __half2 d0 = low_half_twice(word);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t next = words[i + 1];
    q[i] = __byte_perm(word, next, 0x5432);
    word = next;
  }
  const __half2 d1 = low_half_twice(word >> 16);
#pragma unroll
  for (int i = 8; i < 16; ++i) q[i] = words[i + 1];
  q8_words_to_tile(q, d0, d1, tile, r, 8 * index);
}

// A tile out of raw rows. A thread's words lie 17 from those of its neighbour: in other banks.
template <int kCells>
__device__ inline void convert_raw(const std::byte* raw, std::byte* tile) {
  constexpr int kPairs = kLatentDims / 64;
#pragma unroll 1
  for (int at = threadIdx.x; at < kCells * kPairs; at += kTileThreads) {
    const int r = at / kPairs, index = at % kPairs;
    q8_pair_to_tile(raw + r * kRawRowBytes + index * (2 * kQ8Bytes), tile, r, index);
  }
#pragma unroll 1
  for (int at = threadIdx.x; at < kCells * kRopeChunks; at += kTileThreads) {
    const int r = at / kRopeChunks, chunk = at % kRopeChunks;
    const std::byte* from = raw + r * kRawRowBytes + (kRawLatentChunks + chunk) * kChunk;
    *reinterpret_cast<uint4*>(chunk_at(tile, r, kLatentChunks + chunk)) =
        *reinterpret_cast<const uint4*>(from);
  }
}

// 34 bytes at an even address -> 32 halves in 4 chunks of a tile's row.
__device__ inline void q8_block_to_tile(const std::byte* block, std::byte* tile, int r, int index) {
  const auto* words = reinterpret_cast<const uint16_t*>(block);
  const __half2 d = low_half_twice(words[0]);
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const uint16_t* q = words + 1 + 4 * part;
    const uint2 lo = q8_to_halves(q[0] | static_cast<uint32_t>(q[1]) << 16, d);
    const uint2 hi = q8_to_halves(q[2] | static_cast<uint32_t>(q[3]) << 16, d);
    *reinterpret_cast<uint4*>(chunk_at(tile, r, 4 * index + part)) =
        make_uint4(lo.x, lo.y, hi.x, hi.y);
  }
}

// A tile out of the cache's Q8_0 rows, at once. The caller commits the rope parts.
template <bool kBy16, int kCells>
__device__ inline void convert_rows(const AttentionArgs& a, const TileRows<kCells>& rows,
                                    std::byte* tile) {
#pragma unroll
  for (int pass = 0; pass < rows.kPasses; ++pass) {
    const int r = pass * kPassRows + static_cast<int>(threadIdx.x) / kRowThreads;
    const int row = rows.row[pass];
    for (int index = static_cast<int>(threadIdx.x) % kRowThreads; index < kLatentDims / 32;
         index += kRowThreads) {
      if (row >= 0 && 32 * index < a.c) {
        q8_block_to_tile(cell_at(a.latent, row) + index * kQ8Bytes, tile, r, index);
      } else {
        for (int part = 0; part < 4; ++part) zero_chunk(chunk_at(tile, r, 4 * index + part));
      }
    }
    copy_part<kRopeChunks, kBy16>(row >= 0 ? cell_at(a.rope, row) : nullptr, 2 * a.r,
                                  tile + (r * kRowChunks + kLatentChunks) * kChunk, r & 7);
  }
}

// The part of a piece whose cells are all later than its tokens: zeros, which whoever adds parts up
// loads before it knows that they weigh nothing.
template <int kRows>
__device__ inline void write_unseen_part(const AbsorbedVariant& variant, int slot) {
  constexpr int kChunks = kRows * kLatentDims * 2 / 16;
  const int n_threads = static_cast<int>(blockDim.x);
  auto* part = reinterpret_cast<uint4*>(variant.parts) + int64_t{slot} * kChunks;
  for (int i = threadIdx.x; i < kChunks; i += n_threads) part[i] = uint4{0, 0, 0, 0};
  if (threadIdx.x < kRows) variant.lse[int64_t{slot} * kRows + threadIdx.x] = kMinusInf;
}

}  // namespace mla::cuda
