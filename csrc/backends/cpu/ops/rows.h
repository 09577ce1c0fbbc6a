// Walking the rows (innermost dims) of strided operands, in parallel where that pays.
#pragma once

#include <algorithm>

#include "backends/cpu/ops/ops.h"

namespace mla::cpu {

// Less work than this stays with the caller: reading and writing 64 KiB takes about as long
// (some 5 us) as waking a worker that has gone to sleep.
inline constexpr int64_t kMinChunkBytes = 64 * 1024;

// Calls body(begin, end, thread) for runs of items that cover [0, n_items). Every item is computed
// whole by one body, so the result cannot depend on the split.
template <class Body>
void for_items(const CpuRun& run, int64_t n_items, int64_t item_bytes, const Body& body) {
  const int64_t min_items = kMinChunkBytes / std::max<int64_t>(item_bytes, 1) + 1;
  const sys::RowSplit split = sys::split_rows(n_items, run.pool.n_threads(), 1, min_items);
  if (split.n_chunks() <= 1) {
    if (n_items > 0) body(0, n_items, 0);
    return;
  }
  run.pool.parallel_for(split.n_chunks(), [&](int64_t chunk, int thread) {
    body(split.begin(chunk), split.end(chunk), thread);
  });
}

inline int64_t n_rows(const Shape& shape) {
  return shape.extent[0] * shape.extent[1] * shape.extent[2];
}

// Row `row` of a tensor, counted over its three outer dims.
inline std::byte* row_at(const Tensor& x, int64_t row) {
  const int64_t i2 = row % x.shape.extent[2];
  const int64_t outer = row / x.shape.extent[2];
  return x.at(outer / x.shape.extent[1], outer % x.shape.extent[1], i2);
}

// n elements at p as contiguous float32: where they lie, if they are that already, else in `room`.
inline const float* as_f32(const CpuRun& run, const std::byte* p, const Layout& x, int64_t n,
                           float* room) {
  if (x.format == Format::F32 && x.stride[3] == 4) return reinterpret_cast<const float*>(p);
  run.kernels.row->to_f32(p, x.format, x.stride[3], n, room);
  return room;
}

// Scratch for one float32 row per operand and thread.
inline size_t row_scratch_bytes(int64_t n, int n_operands, int n_threads) {
  return static_cast<size_t>(n) * sizeof(float) * static_cast<size_t>(n_operands) *
         static_cast<size_t>(n_threads);
}
inline float* row_scratch(const CpuRun& run, int64_t n, int n_operands, int thread) {
  return reinterpret_cast<float*>(run.scratch) + thread * n_operands * n;
}

// Elementwise ops work on pieces of rows: small enough that two operands and the result stay in
// the first-level cache (3 * 8 KiB), so that one long row is split over threads as well.
inline constexpr int64_t kPieceElems = 2048;

struct Piece {
  int64_t row;
  int64_t first;  // element of the row
  int64_t n;
};
inline int64_t pieces_per_row(const Shape& shape) {
  return (shape.extent[3] + kPieceElems - 1) / kPieceElems;
}
inline Piece piece_at(const Shape& shape, int64_t index) {
  const int64_t per_row = pieces_per_row(shape);
  const int64_t first = index % per_row * kPieceElems;
  return {index / per_row, first, std::min(kPieceElems, shape.extent[3] - first)};
}

// Calls body(piece) for all pieces of the shape.
template <class Body>
void for_pieces(const CpuRun& run, const Shape& shape, int64_t bytes_per_elem, const Body& body) {
  const int64_t piece_bytes = std::min(kPieceElems, shape.extent[3]) * bytes_per_elem;
  for_items(run, n_rows(shape) * pieces_per_row(shape), piece_bytes,
            [&](int64_t begin, int64_t end, int) {
              for (int64_t i = begin; i < end; ++i) body(piece_at(shape, i));
            });
}

// out[..] = kernel(a, b, n, out): two operands of any float format and strides, result F32 with
// contiguous rows.
using PairKernel = void (*)(const float* a, const float* b, int64_t n, float* out) noexcept;
inline void run_pairs(const Step& step, const CpuRun& run, PairKernel kernel) {
  const Tensor& a = step.in[0];
  const Tensor& b = step.in[1];
  for_pieces(run, step.out.shape, 3 * sizeof(float), [&](const Piece& piece) {
    float room_a[kPieceElems];
    float room_b[kPieceElems];
    const std::byte* pa = row_at(a, piece.row) + piece.first * a.stride[3];
    const std::byte* pb = row_at(b, piece.row) + piece.first * b.stride[3];
    float* out = reinterpret_cast<float*>(row_at(step.out, piece.row)) + piece.first;
    kernel(as_f32(run, pa, a, piece.n, room_a), as_f32(run, pb, b, piece.n, room_b), piece.n, out);
  });
}

}  // namespace mla::cpu
