// What a session does to cells that are already written: move them, and rotate their positions.
#pragma once

#include <cstdint>
#include <span>

#include "backends/cpu/kernels.h"
#include "graph/tensor.h"

namespace mla::cpu {

// rope_plane [cells, R] F32, F16 or BF16, rows contiguous. Each row named by `cells` turns by
// `delta` positions: the pair (2i, 2i + 1) by delta * frequencies[i], [R / 2], the angle in double;
// the row is rounded to the plane's format again. Throws ShapeError, FormatError.
void rotate_rope_rows(const KernelTable& kernels, const Tensor& rope_plane,
                      std::span<const int32_t> cells, std::span<const float> frequencies,
                      int64_t delta);

// plane [cells, n] of any format: row to[i] becomes what row from[i] was before the call.
// Ranges may overlap in any way as long as no cell is written twice. Throws ShapeError.
void copy_cells(const Tensor& plane, std::span<const int32_t> from, std::span<const int32_t> to);

}  // namespace mla::cpu
