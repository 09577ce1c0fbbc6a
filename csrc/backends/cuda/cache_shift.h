// What a session does to cells that are already written: save, load, move and turn them. The calls
// return when it is done; what was enqueued before comes first.
#pragma once

#include <cstdint>
#include <span>

#include "backends/cuda/cuda_backend.h"
#include "graph/tensor.h"

namespace mla::cuda {

// All planes lie in the backend's memory: [cells, width], contiguous rows, any format where nothing
// else is said. All throw ShapeError, DeviceError, MemoryLimitError.

// rows: in host memory, one after the other.
void read_cells(const CudaBackend& backend, const Tensor& plane, std::span<const int32_t> cells,
                std::byte* rows);
void write_cells(const CudaBackend& backend, const Tensor& plane, std::span<const int32_t> cells,
                 const std::byte* rows);

// Row to[i] becomes what row from[i] was before the call. Ranges may overlap in any way as long as
// no cell is written twice.
void copy_cells(const CudaBackend& backend, const Tensor& plane, std::span<const int32_t> from,
                std::span<const int32_t> to);

// rope_plane [cells, R] F32, F16 or BF16. Each row named by `cells`, once, turns by `delta`
// positions: the pair (2i, 2i + 1) by delta * frequencies[i], [R / 2], the angle in double; the row
// is rounded to the plane's format again. Throws FormatError too.
void rotate_rope_rows(const CudaBackend& backend, const Tensor& rope_plane,
                      std::span<const int32_t> cells, std::span<const float> frequencies,
                      int64_t delta);

}  // namespace mla::cuda
