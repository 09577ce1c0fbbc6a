// out = x: same format (blocks and integers too) or between float formats; any strides on both
// sides.
#include <cstring>

#include "backends/cpu/ops/rows.h"

namespace mla::cpu {
namespace {

void copy_elems(std::byte* out, int64_t out_stride, const std::byte* x, int64_t x_stride,
                int64_t elem_bytes, int64_t n) {
  if (out_stride == elem_bytes && x_stride == elem_bytes) {
    std::memcpy(out, x, static_cast<size_t>(n * elem_bytes));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(out + i * out_stride, x + i * x_stride, static_cast<size_t>(elem_bytes));
  }
}

void copy_same_format(const Tensor& out, const Tensor& x, const CpuRun& run) {
  const FormatTraits& format = traits(x.format);
  Shape blocks = x.shape;  // the innermost dim counted in blocks; floats are blocks of one
  blocks.extent[3] /= format.block_elems;
  for_pieces(run, blocks, 2 * format.block_bytes, [&](const Piece& piece) {
    copy_elems(row_at(out, piece.row) + piece.first * out.stride[3], out.stride[3],
               row_at(x, piece.row) + piece.first * x.stride[3], x.stride[3], format.block_bytes,
               piece.n);
  });
}

void copy_converted(const Tensor& out, const Tensor& x, const CpuRun& run) {
  const RowTable& kernels = *run.kernels.row;
  const int64_t out_bytes = traits(out.format).block_bytes;
  for_pieces(run, x.shape, out_bytes + traits(x.format).block_bytes, [&](const Piece& piece) {
    float room[kPieceElems];
    std::byte narrow[kPieceElems * sizeof(float)];
    const std::byte* from = row_at(x, piece.row) + piece.first * x.stride[3];
    std::byte* to = row_at(out, piece.row) + piece.first * out.stride[3];
    const float* wide = as_f32(run, from, x, piece.n, room);
    if (out.stride[3] == out_bytes) {
      kernels.from_f32(wide, piece.n, out.format, to);
    } else {
      kernels.from_f32(wide, piece.n, out.format, narrow);
      copy_elems(to, out.stride[3], narrow, out_bytes, out_bytes, piece.n);
    }
  });
}

void run_copy(const Step& step, const CpuRun& run) {
  if (step.out.format == step.in[0].format) {
    copy_same_format(step.out, step.in[0], run);
  } else {
    copy_converted(step.out, step.in[0], run);
  }
}

}  // namespace

const CpuOp copy_op = {always, no_scratch, run_copy};

}  // namespace mla::cpu
