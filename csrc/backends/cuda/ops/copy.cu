// out = x: same format (blocks and integers too) or between float formats; any strides on both
// sides.
//
// What keeps its format is moved as units of 2 to 16 bytes: the largest that all strides and both
// addresses are multiples of. Conversions round to nearest even.
#include "backends/cuda/ops/copy.h"

#include "backends/cuda/kernels/elementwise.cuh"
#include "backends/cuda/ops/ops.h"

namespace mla::cuda {
namespace {

struct Same {
  __device__ float operator()(float a, float) const { return a; }
};

template <class Unit>
__global__ void __launch_bounds__(kElementThreads)
    move_kernel(std::byte* out, const std::byte* x, Walk walk) {
  pdl_wait();
  const int64_t i = int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
  if (i >= walk.n) return;
  const WalkOffsets offset = walk_offsets(walk, i);
  *reinterpret_cast<Unit*>(out + offset.at[0]) = *reinterpret_cast<const Unit*>(x + offset.at[1]);
}

// Makes a walk over elements of `bytes` one over units: the largest that rows of adjacent elements
// can be moved by; other rows keep their elements, which are 2 or 4 bytes then. Returns its bytes.
int64_t walk_by_units(const std::byte* out, const std::byte* x, int64_t bytes, Walk& walk) {
  if (walk.stride[0][3] != bytes || walk.stride[1][3] != bytes) return bytes;
  uint64_t bits = reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(x) | 16 |
                  static_cast<uint64_t>(bytes * walk.extent[3]);
  for (int d = 0; d < 3; ++d) {
    bits |= static_cast<uint64_t>(walk.stride[0][d] | walk.stride[1][d]);
  }
  const auto unit = static_cast<int64_t>(bits & (~bits + 1));  // the lowest bit
  walk.n = walk.n / walk.extent[3];
  walk.extent[3] = walk.extent[3] * bytes / unit;
  walk.n *= walk.extent[3];
  walk.stride[0][3] = walk.stride[1][3] = unit;
  return unit;
}

template <class Unit>
void move(const CudaRun& run, const View& out, const View& x, const Walk& walk) {
  const auto n_blocks = (walk.n + kElementThreads - 1) / kElementThreads;
  launch(run, move_kernel<Unit>, dim3(static_cast<unsigned>(n_blocks)), dim3(kElementThreads), 0,
         out.data, static_cast<const std::byte*>(x.data), walk);
}

void copy_same_format(const CudaRun& run, const View& out, const View& x) {
  const FormatTraits& format = traits(x.format);
  const int64_t extent[4] = {x.extent[0], x.extent[1], x.extent[2],
                             x.extent[3] / format.block_elems};
  Walk walk = merged_walk(extent, {out.stride, x.stride, nullptr}, format.quantized);
  if (walk.n == 0) return;
  const int64_t unit = walk_by_units(out.data, x.data, format.block_bytes, walk);
  if (unit == 2) return move<uint16_t>(run, out, x, walk);
  if (unit == 4) return move<uint32_t>(run, out, x, walk);
  if (unit == 8) return move<uint2>(run, out, x, walk);
  move<uint4>(run, out, x, walk);
}

std::string_view refusal(const Node& node, const DeviceInfo&) {
  const Node* x = node.input(0);
  const Node* root = root_of(const_cast<Node*>(x)).node;
  const bool is_packed =
      traits(x->format()).quantized && root->op == Op::weight && root->layout.is_contiguous();
  return is_packed ? "quantized weights lie packed on the device" : "";
}

void run_copy(const Step& step, const CudaRun& run) {
  copy_strided(run, view(step.out), view(step.in[0]));
}

}  // namespace

void copy_strided(const CudaRun& run, const View& out, const View& x) {
  if (out.format == x.format) {
    copy_same_format(run, out, x);
  } else {
    run_elementwise<Same>(run, out, x, nullptr);
  }
}

const CudaOp copy_op = {refusal, no_scratch, run_copy};

}  // namespace mla::cuda
