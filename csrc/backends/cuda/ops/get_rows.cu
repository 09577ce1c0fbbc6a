// out[t, :] = table[ids[t], :], decoded to float32; NaN where an id is out of range.
//
//   table [V, D] plain, any strides, or packed (see packed.h); ids [T] -> [T, D]
//
// Quantized: a thread decodes a group of 32 elements. Plain: a thread has one element. Values are
// those of the reference decoder to the bit.
#include "backends/cuda/kernels/decode.cuh"
#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/ops/ops.h"
#include "backends/cuda/packed.h"

namespace mla::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kGroup = 32;

struct Gather {
  View table;
  const std::byte* ids;
  int64_t id_stride;
  float* out;  // [T, D]
  int64_t n_tokens, width;
  int64_t n_blocks;  // of a quantized row
};

// Null where the id is out of range.
__device__ const std::byte* row_of(const Gather& g, int64_t token) {
  const auto id = *reinterpret_cast<const int32_t*>(g.ids + token * g.id_stride);
  if (id < 0 || id >= g.table.extent[2]) return nullptr;
  return g.table.data + id * g.table.stride[2];
}

template <Format F>
__global__ void __launch_bounds__(kThreads) get_packed_rows_kernel(Gather g) {
  pdl_wait();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t n_groups = g.width / kGroup;
  if (i >= g.n_tokens * n_groups) return;
  const int64_t token = i / n_groups;
  const int64_t group = i - token * n_groups;
  const std::byte* row = row_of(g, token);
  float values[kGroup];
  if (row != nullptr) {
    decode_group<F>(row, g.n_blocks, group, values);
  } else {
#pragma unroll
    for (float& value : values) value = NAN;
  }
  auto* out = reinterpret_cast<float4*>(g.out + token * g.width + group * kGroup);
#pragma unroll
  for (int j = 0; j < kGroup / 4; ++j) {
    out[j] = make_float4(values[4 * j], values[4 * j + 1], values[4 * j + 2], values[4 * j + 3]);
  }
}

__global__ void __launch_bounds__(kThreads) get_plain_rows_kernel(Gather g) {
  pdl_wait();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= g.n_tokens * g.width) return;
  const int64_t token = i / g.width;
  const std::byte* row = row_of(g, token);
  g.out[i] = row != nullptr
                 ? load_element(row + (i - token * g.width) * g.table.stride[3], g.table.format)
                 : NAN;
}

unsigned blocks_for(int64_t n_threads) {
  return static_cast<unsigned>((n_threads + kThreads - 1) / kThreads);
}

template <Format F>
void get_packed_rows(const CudaRun& run, Gather g) {
  g.n_blocks = g.width / traits(F).block_elems;
  launch(run, get_packed_rows_kernel<F>, dim3(blocks_for(g.n_tokens * g.width / kGroup)),
         dim3(kThreads), 0, g);
}

std::string_view refusal(const Node& node, const DeviceInfo&) {
  const Node* table = node.input(0);
  return traits(table->format()).quantized ? packed_refusal(table) : "";
}

void run_get_rows(const Step& step, const CudaRun& run) {
  const Tensor& ids = step.in[1];
  Gather g = {};
  g.table = view(step.in[0]);
  g.ids = ids.data;
  g.id_stride = ids.stride[3];
  g.out = step.out.ptr<float>();
  g.n_tokens = ids.shape.extent[3];
  g.width = g.table.extent[3];
  switch (g.table.format) {
#define MLA_FORMAT(name, gguf, elems, bytes) \
  case Format::name:                         \
    return get_packed_rows<Format::name>(run, g);
#include "quant/formats.def"
    default:
      launch(run, get_plain_rows_kernel, dim3(blocks_for(g.n_tokens * g.width)), dim3(kThreads), 0,
             g);
  }
}

}  // namespace

const CudaOp get_rows_op = {refusal, no_scratch, run_get_rows};

}  // namespace mla::cuda
