// Blocks to planes, one kernel for all formats: the fields of a block come as a table.
//
//   raw     row r: blocks of block_bytes, from raw + r * n_blocks * block_bytes on
//   packed  row r: plane i at plane_offset(i, n_blocks): its field of every block, padded to 16
//
// Each CUDA block moves a tile of blocks of one row through shared memory: read as it lies, 16
// bytes at a time, and written plane by plane, likewise. Bytes are copied: no error.
#include "backends/cuda/kernels/intrinsics.cuh"
#include "backends/cuda/pack.h"
#include "backends/cuda/packed.h"

namespace mla::cuda {
namespace {

constexpr int kThreads = 256;
// Raw bytes of a tile: enough for each thread to have four 16-byte loads under way, and little
// enough for eight tiles in the 128 KiB that an SM has at least.
constexpr int kTileBytes = 16 * 1024;
// Any number of bytes of this many blocks is a multiple of 16, so that tiles begin at 16-byte words
// of every plane.
constexpr int kTileUnit = 16;

struct Packing {
  Field fields[kMaxPlanes];
  int64_t plane_offset[kMaxPlanes];
  int64_t n_blocks;  // of a row
  int64_t row_bytes, packed_row_bytes;
  int block_bytes;
  int tile_blocks, tiles_per_row;
};

// n bytes at `from`, an even address, to shared memory, at the same distance from a 16-byte word.
__device__ void load_tile(std::byte* tile, const std::byte* from, int n, int shift) {
  const int n_words = (shift + n + 15) / 16;
  for (int word = threadIdx.x; word < n_words; word += kThreads) {
    const int first = word * 16 - shift;  // of the n bytes
    if (first >= 0 && first + 16 <= n) {
      *reinterpret_cast<uint4*>(tile + word * 16) = *reinterpret_cast<const uint4*>(from + first);
      continue;
    }
    for (int i = max(first, 0); i < min(first + 16, n); i += 2) {  // no byte beside the tile
      *reinterpret_cast<uint16_t*>(tile + shift + i) = *reinterpret_cast<const uint16_t*>(from + i);
    }
  }
}

// The bytes 16 * word .. of a plane of n_blocks fields; raw blocks begin at `tile`.
__device__ uint4 gather_word(const std::byte* tile, Field field, int block_bytes, int n_blocks,
                             int word) {
  union {
    uint16_t half[8];
    uint4 all;
  } out;
  const int n_bytes = field.bytes * n_blocks;
  int block = word * 16 / field.bytes;
  int within = word * 16 - block * field.bytes;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool inside = word * 16 + 2 * i < n_bytes;
    const std::byte* at = tile + block * block_bytes + field.offset + within;
    out.half[i] = inside ? *reinterpret_cast<const uint16_t*>(at) : uint16_t{0};
    within += 2;
    if (within == field.bytes) {
      within = 0;
      ++block;
    }
  }
  return out.all;
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(const std::byte* raw, std::byte* packed, Packing p) {
  pdl_wait();
  const int64_t row = blockIdx.x / p.tiles_per_row;
  const int64_t first = (blockIdx.x - row * p.tiles_per_row) * int64_t{p.tile_blocks};
  const int64_t left = p.n_blocks - first;
  const int n = left < p.tile_blocks ? static_cast<int>(left) : p.tile_blocks;
  const std::byte* from = raw + row * p.row_bytes + first * p.block_bytes;
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16);
  std::byte* tile = dynamic_smem();
  load_tile(tile, from, n * p.block_bytes, shift);
  __syncthreads();
  for (int plane = 0; plane < kMaxPlanes; ++plane) {
    const Field field = p.fields[plane];
    if (field.bytes == 0) break;
    std::byte* out =
        packed + row * p.packed_row_bytes + p.plane_offset[plane] + first * field.bytes;
    const int n_words = (field.bytes * n + 15) / 16;
    for (int word = threadIdx.x; word < n_words; word += kThreads) {
      *reinterpret_cast<uint4*>(out + word * 16) =
          gather_word(tile + shift, field, p.block_bytes, n, word);
    }
  }
}

Packing packing_of(Format format, int64_t n_elems) {
  const FormatTraits& t = traits(format);
  Packing p = {};
  p.n_blocks = n_elems / t.block_elems;
  p.row_bytes = row_bytes(format, n_elems);
  p.packed_row_bytes = packed_row_bytes(format, n_elems);
  p.block_bytes = static_cast<int>(t.block_bytes);
  p.tile_blocks = kTileBytes / (p.block_bytes * kTileUnit) * kTileUnit;
  p.tiles_per_row = static_cast<int>((p.n_blocks + p.tile_blocks - 1) / p.tile_blocks);
  const auto& fields = packed_fields(format);
  for (int i = 0; i < kMaxPlanes; ++i) {
    p.fields[i] = fields[static_cast<size_t>(i)];
    p.plane_offset[i] = plane_offset(fields, i, p.n_blocks);
  }
  return p;
}

// Rows of one launch: grids have at most 2^31 - 1 blocks.
constexpr int64_t kMaxGrid = 1 << 30;

}  // namespace

void pack_rows(const CudaRun& run, Format format, const std::byte* raw, int64_t n_rows,
               int64_t n_elems, std::byte* packed) {
  const Packing p = packing_of(format, n_elems);
  if (p.tiles_per_row == 0) return;
  const int64_t rows_at_once = kMaxGrid / p.tiles_per_row;
  for (int64_t row = 0; row < n_rows; row += rows_at_once) {
    const int64_t n = std::min(rows_at_once, n_rows - row);
    launch(run, pack_kernel, dim3(static_cast<unsigned>(n * p.tiles_per_row)), dim3(kThreads),
           kTileBytes + 16, raw + row * p.row_bytes, packed + row * p.packed_row_bytes, p);
  }
}

}  // namespace mla::cuda
