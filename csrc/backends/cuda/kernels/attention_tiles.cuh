// Tiles of the latent cache in shared memory.
//
// A tile is kTileCells rows of kKeyDims numbers (latent, then rope), 72 chunks of 16 bytes. Chunk c
// of row r lies at place c ^ (r % 8) of its row: the 8 rows that ldmatrix reads at a time are then
// in 8 different groups of banks, and so are the chunks that are written side by side.
// Keys are rows of the tile, values the first 512 columns of the same rows.
//
// F16 and BF16 rows are copied as they are, asynchronously, one tile ahead of its use. Q8_0 rows
// are copied raw and become halves (d * q, rounded once) just before their use; where shared memory
// has no room for the raw rows, they are read from the cache at that point.
#pragma once

#include "backends/cuda/kernels/attention_operand.cuh"
#include "backends/cuda/kernels/attention_schedule.cuh"

namespace mla::cuda {

inline constexpr int kTileThreads = 256;
inline constexpr int kChunk = 16;  // bytes
inline constexpr int kChunkElems = kChunk / 2;
inline constexpr int kRowChunks = kKeyDims / kChunkElems;
inline constexpr int kLatentChunks = kLatentDims / kChunkElems;
inline constexpr int kRopeChunks = kRopeDims / kChunkElems;
inline constexpr int kTileBytes = kTileCells * kRowChunks * kChunk;  // 73,728
static_assert(kRowChunks % 8 == 0, "the swizzle stays within a row");

// Raw Q8_0 rows: 16 blocks of 34 bytes, then the rope part.
inline constexpr int kRawLatentChunks = kLatentDims / 32 * kQ8Bytes / kChunk;  // 34
inline constexpr int kRawRowBytes = (kRawLatentChunks + kRopeChunks) * kChunk;
inline constexpr int kRawBytes = kTileCells * kRawRowBytes;  // 43,008

// Eight neighbouring threads copy a row: 128 bytes at a time.
inline constexpr int kRowThreads = 8;
inline constexpr int kPassRows = kTileThreads / kRowThreads;
inline constexpr int kPasses = kTileCells / kPassRows;

// The chunk number is a sum of two that share no bits: what the lane decides, and what is known
// when the code is compiled. The latter then costs one exclusive or for each of 4 places, and an
// offset.
__device__ __forceinline__ std::byte* chunk_at(std::byte* rows, int row, int chunk, int fixed = 0) {
  const int place = (chunk ^ (row & 7)) ^ (fixed & 7);
  return rows + row * (kRowChunks * kChunk) + place * kChunk + fixed / 8 * (8 * kChunk);
}

// Where this thread's rows of one tile are in the cache; -1 behind the last cell.
struct TileRows {
  int row[kPasses];
};
__device__ inline TileRows find_rows(const AttentionArgs& a, const Span& span, int tile) {
  TileRows rows;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int cell =
        tile * kTileCells + pass * kPassRows + static_cast<int>(threadIdx.x) / kRowThreads;
    rows.row[pass] = cell < span.n_cells ? static_cast<int>(cache_row(a, span, cell)) : -1;
  }
  return rows;
}

// A plane's part of a row: kChunks places from `to` on, of which the model fills n_bytes (a
// multiple of 4, and of 16 where by_16); the rest, and all of it where `from` is null, becomes
// zeros. swizzle: what the numbers of places are combined with, see chunk_at.
template <int kChunks>
__device__ __forceinline__ void copy_part(const std::byte* from, int n_bytes, bool by_16,
                                          std::byte* to, int swizzle) {
  const int first = static_cast<int>(threadIdx.x) % kRowThreads;
  const int filled = from != nullptr ? n_bytes : 0;
  std::byte* place = to + (first ^ swizzle) * kChunk;
  if (by_16) {
#pragma unroll 4
    for (int i = 0; i < (kChunks + kRowThreads - 1) / kRowThreads; ++i) {
      const int at = (first + i * kRowThreads) * kChunk;
      if (kChunks % kRowThreads != 0 && at >= kChunks * kChunk) continue;
      cp_async16(place + i * (kRowThreads * kChunk), from + at, at < filled);
    }
    return;
  }
  for (int at = first * kChunk; at < kChunks * kChunk; at += kRowThreads * kChunk) {
    for (int i = 0; i < kChunk; i += 4) cp_async4(place + i, from + at + i, at + i < filled);
    place += kRowThreads * kChunk;
  }
}

__device__ inline void zero_chunk(std::byte* to) {
  *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
}

// Rows of 16-bit numbers straight into a tile. The caller commits.
__device__ inline void copy_tile(const AttentionArgs& a, const TileRows& rows, bool by_16,
                                 std::byte* tile) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int r = pass * kPassRows + static_cast<int>(threadIdx.x) / kRowThreads;
    const int row = rows.row[pass];
    const bool has = row >= 0;
    std::byte* to = tile + r * (kRowChunks * kChunk);
    copy_part<kLatentChunks>(has ? cell_at(a.latent, row) : nullptr, 2 * a.c, by_16, to, r & 7);
    copy_part<kRopeChunks>(has ? cell_at(a.rope, row) : nullptr, 2 * a.r, by_16,
                           to + kLatentChunks * kChunk, r & 7);
  }
}

// Q8_0 rows and their rope parts, raw.
__device__ inline void copy_raw(const AttentionArgs& a, const TileRows& rows, bool by_16,
                                std::byte* raw) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int r = pass * kPassRows + static_cast<int>(threadIdx.x) / kRowThreads;
    const int row = rows.row[pass];
    const bool has = row >= 0;
    std::byte* to = raw + r * kRawRowBytes;
    copy_part<kRawLatentChunks>(has ? cell_at(a.latent, row) : nullptr, a.c / 32 * kQ8Bytes, by_16,
                                to, 0);
    copy_part<kRopeChunks>(has ? cell_at(a.rope, row) : nullptr, 2 * a.r, by_16,
                           to + kRawLatentChunks * kChunk, 0);
  }
}

// 34 bytes at an even address -> 32 halves in 4 chunks of a tile's row.
__device__ inline void q8_block_to_tile(const std::byte* block, std::byte* tile, int r, int index) {
  const auto* words = reinterpret_cast<const uint16_t*>(block);
  const float d = half_bits_to_float(words[0]);
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t two = words[1 + 4 * part + i];
      packed[i] = pack_operands<__half>(d * static_cast<float>(static_cast<int8_t>(two & 0xff)),
                                        d * static_cast<float>(static_cast<int8_t>(two >> 8)));
    }
    *reinterpret_cast<uint4*>(chunk_at(tile, r, 4 * index + part)) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

// A tile out of raw rows.
__device__ inline void convert_raw(const std::byte* raw, std::byte* tile) {
  constexpr int kBlocks = kLatentDims / 32;
  for (int at = threadIdx.x; at < kTileCells * kBlocks; at += kTileThreads) {
    const int r = at / kBlocks, index = at % kBlocks;
    q8_block_to_tile(raw + r * kRawRowBytes + index * kQ8Bytes, tile, r, index);
  }
  for (int at = threadIdx.x; at < kTileCells * kRopeChunks; at += kTileThreads) {
    const int r = at / kRopeChunks, chunk = at % kRopeChunks;
    const std::byte* from = raw + r * kRawRowBytes + (kRawLatentChunks + chunk) * kChunk;
    *reinterpret_cast<uint4*>(chunk_at(tile, r, kLatentChunks + chunk)) =
        *reinterpret_cast<const uint4*>(from);
  }
}

// A tile out of the cache's Q8_0 rows, at once. The caller commits the rope parts.
__device__ inline void convert_rows(const AttentionArgs& a, const TileRows& rows, bool by_16,
                                    std::byte* tile) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
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
    copy_part<kRopeChunks>(row >= 0 ? cell_at(a.rope, row) : nullptr, 2 * a.r, by_16,
                           tile + (r * kRowChunks + kLatentChunks) * kChunk, r & 7);
  }
}

}  // namespace mla::cuda
