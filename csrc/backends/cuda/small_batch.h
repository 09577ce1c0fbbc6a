// The launch of small_batch.cuh: what its kernels are given, and the table of kernels per format.
#pragma once

#include "backends/cuda/packed.h"
#include "backends/cuda/product.h"
#include "backends/cuda/row_layout.h"

namespace mla::cuda {

inline constexpr int kMaxSmallRows = 64;        // of one matrix: 8 tiles of 8 columns
inline constexpr int kMaxRoutedPairs = 512;     // 2 for each thread of a block
inline constexpr int kMaxRoutedExperts = 1024;  // whose pairs a block counts

// Rows of x on their way to f16: staged_rows.cuh.
inline constexpr int kMaxStageThreads = 1024;
inline constexpr int kStagedUnitsPerWarp = 4;  // in registers
inline constexpr int kMaxStagedK = kMaxStageThreads / 32 * kStagedUnitsPerWarp * kStagedUnit;

struct StageRows {
  Product product;
  bool fours = false;  // x may be read four neighbours at a time
  std::byte* out = nullptr;
  float* scales = nullptr;
  int pitch = 0;
  int* counters = nullptr;
  int n_counters = 0;
};

struct SmallBatch {
  Product product;
  Finish finish = Finish::store;
  int planes[kMaxPlanes + 1] = {};  // where those of a row of w begin, and the last ends
  int n_units = 0;                  // of k
  int n_steps = 0;                  // of k
  int tiles_per_job = 0;            // of rows of w
  int rows_per_matrix = 0;          // of x; this and the next two not of routed products
  int column_tiles = 1;             // of them
  int n_jobs = 0;
  const std::byte* staged = nullptr;
  const float* scales = nullptr;
  int pitch = 0;  // of staged rows
  float* parts = nullptr;
  int* counters = nullptr;
};

// Of n_tiles tiles of 8 rows of x. Many rows want all of a multiprocessor's memory for one block,
// which then reads x half as often.
constexpr int small_batch_warps(int n_tiles) { return n_tiles <= 4 ? 8 : 16; }
constexpr int small_batch_threads(int n_tiles) { return 32 * small_batch_warps(n_tiles); }
// Blocks of a multiprocessor, and how much of its 227 KiB each may have for its rings.
constexpr int small_batch_blocks(int n_tiles) { return n_tiles <= 4 ? 2 : 1; }
constexpr int small_batch_room(int n_tiles) { return n_tiles <= 4 ? 108 << 10 : 220 << 10; }

// How a block goes along k: so many units at a time, in rings of so many stages.
struct Steps {
  int units, stages;
};

// Bytes of a stage: a unit of weights for each warp, one of x for each column.
constexpr int stage_bytes_of(int w_unit_bytes, int x_unit_bytes, int n_tiles) {
  return small_batch_warps(n_tiles) * w_unit_bytes + 8 * n_tiles * x_unit_bytes;
}

// Two units at a time halve what is not arithmetic; else three stages. Code for devices with 64 or
// 99 KiB (version: 75, 86, 89, 120) has no room for either.
constexpr Steps steps_of(int w_unit_bytes, int x_unit_bytes, int n_tiles, int version) {
  const bool roomy = version == 80 || (version >= 90 && version < 120);
  const int bytes = stage_bytes_of(w_unit_bytes, x_unit_bytes, n_tiles);
  const int room = roomy ? small_batch_room(n_tiles) : 0;
  if (4 * bytes <= room) return {2, 2};
  return {1, 3 * bytes <= room ? 3 : 2};
}

bool small_batch_fits(const Product& product, const DeviceInfo& device);
size_t small_batch_scratch_bytes(const Product& product, const DeviceInfo& device);
void run_small_batch(const CudaRun& run, const Product& product, Finish finish);

}  // namespace mla::cuda
