// What a session does to cells that are already written, in device memory: save, load, move and
// turn them. These enqueue kernels; backends/cuda/cache_shift.h has the calls that wait.
#pragma once

#include "backends/cuda/cuda_op.h"

namespace mla::cuda {

// Cell numbers in device memory, all within the plane.
struct CellList {
  const int32_t* cells = nullptr;
  int64_t n = 0;
};

// plane [cells, width] of any format with contiguous rows; rows: n rows, one after the other, at a
// multiple of 256.
void gather_cells(const CudaRun& run, const View& plane, CellList from, std::byte* rows);
// No cell may be named twice.
void scatter_cells(const CudaRun& run, const View& plane, CellList to, const std::byte* rows);

// plane [cells, R] F32, F16 or BF16, contiguous rows: the pair (2i, 2i + 1) of each cell turns by
// delta * frequencies[i]; the result is rounded to the plane's format again. frequencies [R / 2] in
// device memory. No cell may be named twice.
void rotate_cells(const CudaRun& run, const View& plane, CellList cells, const float* frequencies,
                  int32_t delta);

}  // namespace mla::cuda
