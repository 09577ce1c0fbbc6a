// Rotates the pairs (2i, 2i + 1) of x [T, H, R] by position * frequency.
#include "backends/cpu/ops/rows.h"

namespace mla::cpu {
namespace {

struct Heads {  // x [T, R] has one head a token
  int64_t n_tokens, n_heads, token_stride, head_stride;
};

Heads heads_of(const Tensor& x) {
  if (x.shape.rank == 2) return {x.shape.extent[2], 1, x.stride[2], 0};
  return {x.shape.extent[1], x.shape.extent[2], x.stride[1], x.stride[2]};
}

// Per thread: a row of x (R), cosines and sines (R / 2 each); and the frequencies (R / 2).
size_t thread_elems(int64_t r) { return static_cast<size_t>(5 * (r / 2)); }

size_t scratch_bytes(const Node& node, const KernelTable&, int n_threads) {
  return thread_elems(node.dim(-1)) * sizeof(float) * static_cast<size_t>(n_threads);
}

void run_rope(const Step& step, const CpuRun& run) {
  const Tensor& x = step.in[0];
  const Tensor& positions = step.in[1];
  const Tensor& frequencies = step.in[2];
  const float scale = step.node->attr<RopeAttrs>().scale;
  const int64_t r = x.shape.extent[3];
  const int64_t half = r / 2;
  const Heads in = heads_of(x);
  const Heads to = heads_of(step.out);
  const RowTable& kernels = *run.kernels.row;
  auto body = [&](int64_t begin, int64_t end, int thread) {
    float* room = reinterpret_cast<float*>(run.scratch) + size_t(thread) * thread_elems(r);
    float* cosine = room + r;
    float* sine = cosine + half;
    const float* frequency = as_f32(run, frequencies.data, frequencies, half, sine + half);
    for (int64_t t = begin; t < end; ++t) {  // one rotation a token, shared by its heads
      const auto position =
          *reinterpret_cast<const int32_t*>(positions.data + t * positions.stride[3]);
      kernels.rotation(position, frequency, scale, half, cosine, sine);
      for (int64_t h = 0; h < in.n_heads; ++h) {
        const std::byte* row = x.data + t * in.token_stride + h * in.head_stride;
        std::byte* out = step.out.data + t * to.token_stride + h * to.head_stride;
        kernels.rope(as_f32(run, row, x, r, room), cosine, sine, r, reinterpret_cast<float*>(out));
      }
    }
  };
  for_items(run, in.n_tokens, 2 * in.n_heads * row_bytes(Format::F32, r), body);
}

}  // namespace

const CpuOp rope_op = {always, scratch_bytes, run_rope};

}  // namespace mla::cpu
