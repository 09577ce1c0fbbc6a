// Rows of latents and roped keys into their cells, in the cache's formats.
//
//   latent [T, C], rope [T, R] float32, any strides; cells [T] -> planes [cells, C], [cells, R]
//
// A block has kTokens tokens; its warps share their rows out in pieces of 32 elements, one a lane,
// so that a single token is written by all of them. Q8_0: the scale is max|x| / 127 of each piece,
// in binary16, as the CPU's encoder has it; floats round to nearest even.
// Cells that are negative or past the end are not written; of two rows for one cell the later one
// stays: a block looks for its cells among all tokens after its first.
#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/ops/ops.h"

namespace mla::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kTokens = 8;
constexpr int kPiece = 32;  // a block of Q8_0

struct Plane {
  View rows;  // [T, n] F32
  std::byte* cells;
  Format format;
  int64_t cell_stride;  // bytes
  int n, n_pieces;
};

struct CacheWrite {
  Plane planes[2];
  const std::byte* cells;
  int64_t cell_stride;
  int64_t n_tokens, n_cells;
};

__device__ int32_t cell_at(const CacheWrite& w, int64_t token) {
  return *reinterpret_cast<const int32_t*>(w.cells + token * w.cell_stride);
}

// The cells of the block's tokens; -1 where nothing is written.
__device__ void find_cells(const CacheWrite& w, int64_t first, int n, int32_t (&cells)[kTokens]) {
  if (static_cast<int>(threadIdx.x) < n) {
    const int32_t cell = cell_at(w, first + threadIdx.x);
    cells[threadIdx.x] = cell < w.n_cells ? cell : -1;
  }
  __syncthreads();
  int32_t own[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) own[i] = i < n ? cells[i] : -1;
  __syncthreads();
  for (int64_t t = first + 1 + threadIdx.x; t < w.n_tokens; t += kThreads) {
    const int32_t later = cell_at(w, t);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (later == own[i] && t > first + i) atomicMin(&cells[i], -1);
    }
  }
  __syncthreads();
}

// A lane's x of a piece -> its code, and the piece's scale as lane 0 stores it.
__device__ void write_q8_0(std::byte* block, float x) {
  const float largest = warp_max(fabsf(x));
  // NaN and infinity have no code of 8 bits: the scale carries them.
  const bool is_broken = __ballot_sync(kAllLanes, !(fabsf(x) <= 3.402823466e38f)) != 0;
  const float scale = is_broken ? NAN : largest / 127.0f;
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  // 1.5 * 2^23: adding it rounds to an integer
  const auto code = static_cast<int8_t>(__float_as_int(fmaf(x, inverse, 12582912.0f)));
  if (lane_id() == 0) *reinterpret_cast<__half*>(block) = __float2half_rn(scale);
  *reinterpret_cast<int8_t*>(block + 2 + lane_id()) = code;
}

__device__ void write_piece(const Plane& plane, int64_t token, int32_t cell, int piece) {
  const int i = piece * kPiece + lane_id();
  const std::byte* row = plane.rows.data + token * plane.rows.stride[2];
  const float x = i < plane.n ? load_element(row + i * plane.rows.stride[3], Format::F32) : 0.0f;
  std::byte* out = plane.cells + cell * plane.cell_stride;
  if (plane.format == Format::Q8_0) {
    write_q8_0(out + piece * (2 + kPiece), x);
  } else if (i < plane.n) {
    store_element(out + i * (plane.format == Format::F32 ? 4 : 2), plane.format, x);
  }
}

__global__ void __launch_bounds__(kThreads) cache_write_kernel(CacheWrite w) {
  __shared__ int32_t cells[kTokens];
  pdl_trigger();
  pdl_wait();
  const int64_t first = int64_t{blockIdx.x} * kTokens;
  const int64_t left = w.n_tokens - first;
  const int n = left < kTokens ? static_cast<int>(left) : kTokens;
  find_cells(w, first, n, cells);
  const int per_token = w.planes[0].n_pieces + w.planes[1].n_pieces;
  for (int i = warp_id(); i < n * per_token; i += kWarps) {
    const int token = i / per_token;
    const int piece = i - token * per_token;
    if (cells[token] < 0) continue;
    const bool is_rope = piece >= w.planes[0].n_pieces;
    write_piece(w.planes[is_rope], first + token, cells[token],
                is_rope ? piece - w.planes[0].n_pieces : piece);
  }
}

std::string_view refusal(const Node& node, const DeviceInfo&) {
  const bool adjacent =
      node.input(0)->layout.rows_are_contiguous() && node.input(1)->layout.rows_are_contiguous();
  return adjacent ? "" : "the elements of a cell must lie side by side";
}

Plane plane_of(const Tensor& cells, const Tensor& rows) {
  Plane p = {};
  p.rows = view(rows);
  p.cells = cells.data;
  p.format = cells.format;
  p.cell_stride = cells.stride[2];
  p.n = static_cast<int>(rows.shape.extent[3]);
  p.n_pieces = (p.n + kPiece - 1) / kPiece;
  return p;
}

void run_cache_write(const Step& step, const CudaRun& run) {
  CacheWrite w = {};
  w.planes[0] = plane_of(step.in[0], step.in[2]);
  w.planes[1] = plane_of(step.in[1], step.in[3]);
  w.cells = step.in[4].data;
  w.cell_stride = step.in[4].stride[3];
  w.n_tokens = step.in[2].shape.extent[2];
  w.n_cells = step.in[0].shape.extent[2];
  const auto n_blocks = static_cast<unsigned>((w.n_tokens + kTokens - 1) / kTokens);
  launch(run, cache_write_kernel, dim3(n_blocks), dim3(kThreads), 0, w);
}

}  // namespace

const CudaOp cache_write_op = {refusal, no_scratch, run_cache_write};

}  // namespace mla::cuda
