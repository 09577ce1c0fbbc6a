// Rotates the pairs (2i, 2i + 1) of x [T, H, R] (or [T, R]) by positions[t] * frequencies[i].
//
// A block has some heads of a token: it computes the R / 2 angles once, in double (see
// kernels/math.cuh), and turns the pairs of its heads by them. Error: 3 units in the last place of
// the pair's length.
#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/kernels/math.cuh"
#include "backends/cuda/ops/ops.h"

namespace mla::cuda {
namespace {

constexpr int kThreads = 256;
// Pairs of a block: four a thread, so that the angles, once per block, are the smaller part where
// there are many heads, and a single token with many heads still spreads over several SMs.
constexpr int64_t kBlockPairs = 4 * kThreads;

struct Rope {
  const std::byte* x;
  float* out;
  const std::byte *positions, *frequencies;
  int64_t position_stride, frequency_stride;
  Format format;
  int64_t n_heads, half;  // half = R / 2
  int64_t token_stride, head_stride, elem_stride;
  int64_t heads_per_block, head_blocks;
  bool x_by_two;  // pairs may be read at once
  float scale;
};

__device__ float2 load_pair(const Rope& rope, const std::byte* p) {
  if (rope.x_by_two && rope.format == Format::F32) return *reinterpret_cast<const float2*>(p);
  return make_float2(load_element(p, rope.format), load_element(p + rope.elem_stride, rope.format));
}

__global__ void __launch_bounds__(kThreads) rope_kernel(Rope rope) {
  pdl_wait();
  auto* turn = dynamic_smem<Rotation>();  // [R / 2]
  const int64_t token = blockIdx.x / rope.head_blocks;
  const int64_t first_head = (blockIdx.x - token * rope.head_blocks) * rope.heads_per_block;
  const auto position =
      *reinterpret_cast<const int32_t*>(rope.positions + token * rope.position_stride);
  const auto half = static_cast<int>(rope.half);
  for (int i = threadIdx.x; i < half; i += kThreads) {
    turn[i] =
        rotation(position, load_element(rope.frequencies + i * rope.frequency_stride, Format::F32),
                 rope.scale);
  }
  __syncthreads();
  const int64_t heads_left = rope.n_heads - first_head;
  const auto n_heads =
      static_cast<int>(heads_left < rope.heads_per_block ? heads_left : rope.heads_per_block);
  for (int i = threadIdx.x; i < n_heads * half; i += kThreads) {
    const int pair = i % half;
    const int64_t head = first_head + i / half;
    const float2 x = load_pair(rope, rope.x + token * rope.token_stride + head * rope.head_stride +
                                         2 * pair * rope.elem_stride);
    const Rotation r = turn[pair];
    float* out = rope.out + ((token * rope.n_heads + head) * rope.half + pair) * 2;
    *reinterpret_cast<float2*>(out) =
        make_float2(x.x * r.cosine - x.y * r.sine, x.x * r.sine + x.y * r.cosine);
  }
}

bool pairs_are_aligned(const View& x) {
  const int64_t bytes = traits(x.format).block_bytes;
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(2 * bytes) == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && x.stride[i] % (2 * bytes) == 0;
  return aligned && x.stride[3] == bytes;
}

void run_rope(const Step& step, const CudaRun& run) {
  const View x = view(step.in[0]);
  const bool has_heads = step.in[0].shape.rank == 3;
  const int64_t n_tokens = has_heads ? x.extent[1] : x.extent[2];
  Rope rope = {};
  rope.x = x.data;
  rope.out = step.out.ptr<float>();
  rope.positions = step.in[1].data;
  rope.position_stride = step.in[1].stride[3];
  rope.frequencies = step.in[2].data;
  rope.frequency_stride = step.in[2].stride[3];
  rope.format = x.format;
  rope.n_heads = has_heads ? x.extent[2] : 1;
  rope.half = x.extent[3] / 2;
  rope.token_stride = has_heads ? x.stride[1] : x.stride[2];
  rope.head_stride = has_heads ? x.stride[2] : 0;
  rope.elem_stride = x.stride[3];
  rope.x_by_two = pairs_are_aligned(x);
  rope.scale = step.node->attr<RopeAttrs>().scale;
  if (n_tokens * rope.n_heads * rope.half == 0) return;
  rope.heads_per_block = std::max<int64_t>(1, kBlockPairs / rope.half);
  rope.head_blocks = (rope.n_heads + rope.heads_per_block - 1) / rope.heads_per_block;
  launch(run, rope_kernel, dim3(static_cast<unsigned>(n_tokens * rope.head_blocks)), dim3(kThreads),
         static_cast<size_t>(rope.half) * sizeof(Rotation), rope);
}

std::string_view refusal(const Node& node, const DeviceInfo& device) {
  const size_t bytes = static_cast<size_t>(node.dim(-1) / 2) * sizeof(Rotation);
  return bytes <= device.smem_per_block ? "" : "the angles of a row exceed shared memory";
}

}  // namespace

const CudaOp rope_op = {refusal, no_scratch, run_rope};

}  // namespace mla::cuda
