// Rows of latents and roped keys into their cells, in the cache's formats.
//
//   latent [T, C], rope [T, R] float32, any strides; cells [T] -> planes [cells, C], [cells, R]
//
// A block has kTokens tokens; its warps share their rows out in pieces of 32 elements, one a lane,
// so that a single token is written by all of them. Q8_0: the scale is max|x| / 127 of each piece,
// in binary16, as the CPU's encoder has it; floats round to nearest even.
// Cells that are negative or past the end are not written; of two rows for one cell the later one
// stays: a block looks for its cells among all tokens after its first.
//
// The norm of latents and the rotation of keys may come with it (fusion.h): a block then has one
// token, whose row it makes in shared memory first.
#include "backends/cuda/kernels/math.cuh"
#include "backends/cuda/kernels/norm.cuh"
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

// Of one token's row; null: it is taken as it is.
struct RowNorm {
  bool used = false;
  View x;  // [T, C]
  const std::byte* weight;
  int64_t weight_stride;
  float eps;
};
struct RowRotation {
  bool used = false;
  View x;  // [T, R]
  const std::byte *positions, *frequencies;
  int64_t position_stride, frequency_stride;
  float scale;
};

struct CacheWrite {
  Plane planes[2];
  RowNorm norm;
  RowRotation rotation;
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

// x [T, n], row `token` -> out [n], normed. All threads.
__device__ void norm_row(const RowNorm& norm, int n, int64_t token, float* out) {
  __shared__ NormRoom room;
  const std::byte* row = norm.x.data + token * norm.x.stride[2];
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    out[i] = load_element(row + i * norm.x.stride[3], norm.x.format);
    sum = fmaf(out[i], out[i], sum);
  }
  const NormFactor factor =
      norm_factor(sum, row, norm.x.stride[3], norm.x.format, n, norm.eps, room);
  for (int i = threadIdx.x; i < n; i += kThreads) {
    out[i] = factor.times(out[i]);
    if (norm.weight != nullptr) {
      out[i] *= load_element(norm.weight + i * norm.weight_stride, Format::F32);
    }
  }
}

// x [T, n], row `token` -> out [n], rotated. Threads from the last one down, which have less of a
// norm to do.
__device__ void rotate_row(const RowRotation& r, int n, int64_t token, float* out) {
  const std::byte* row = r.x.data + token * r.x.stride[2];
  const auto position = *reinterpret_cast<const int32_t*>(r.positions + token * r.position_stride);
  for (int i = kThreads - 1 - static_cast<int>(threadIdx.x); i < n / 2; i += kThreads) {
    const Rotation turn = rotation(
        position, load_element(r.frequencies + i * r.frequency_stride, Format::F32), r.scale);
    const float x = load_element(row + 2 * i * r.x.stride[3], r.x.format);
    const float y = load_element(row + (2 * i + 1) * r.x.stride[3], r.x.format);
    out[2 * i] = x * turn.cosine - y * turn.sine;
    out[2 * i + 1] = x * turn.sine + y * turn.cosine;
  }
}

// A block for each token: its rows as the steps before would have left them, then to their cell.
__global__ void __launch_bounds__(kThreads) cache_write_row_kernel(CacheWrite w) {
  __shared__ int later;
  pdl_wait();
  const int64_t token = blockIdx.x;
  const int32_t cell = cell_at(w, token);
  if (threadIdx.x == 0) later = 0;
  __syncthreads();
  for (int64_t t = token + 1 + threadIdx.x; t < w.n_tokens; t += kThreads) {
    if (cell_at(w, t) == cell) later = 1;
  }
  float* rows[2] = {dynamic_smem<float>(), dynamic_smem<float>() + w.planes[0].n};
  if (w.rotation.used) rotate_row(w.rotation, w.planes[1].n, token, rows[1]);
  if (w.norm.used) norm_row(w.norm, w.planes[0].n, token, rows[0]);
  __syncthreads();
  if (cell < 0 || cell >= w.n_cells || later != 0) return;
  const int n_latent = w.planes[0].n_pieces;
  for (int i = warp_id(); i < n_latent + w.planes[1].n_pieces; i += kWarps) {
    const int p = i >= n_latent;
    Plane plane = w.planes[p];
    if (p == 0 ? w.norm.used : w.rotation.used) {
      plane.rows.data = reinterpret_cast<std::byte*>(rows[p]);
      plane.rows.stride[2] = 0;
      plane.rows.stride[3] = sizeof(float);
    }
    write_piece(plane, token, cell, p == 0 ? i : i - n_latent);
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

void set_norm(RowNorm& norm, const Step& step) {
  norm = {true, view(step.in[0]), step.in[1].data, step.in[1].stride[3],
          step.node->attr<RmsNormAttrs>().eps};
}

void set_rotation(RowRotation& r, const Step& step) {
  r = {true,
       view(step.in[0]),
       step.in[1].data,
       step.in[2].data,
       step.in[1].stride[3],
       step.in[2].stride[3],
       step.node->attr<RopeAttrs>().scale};
}

void run_cache_write(const Step& step, const CudaRun& run) {
  CacheWrite w = {};
  w.planes[0] = plane_of(step.in[0], step.in[2]);
  w.planes[1] = plane_of(step.in[1], step.in[3]);
  w.cells = step.in[4].data;
  w.cell_stride = step.in[4].stride[3];
  w.n_tokens = step.in[2].shape.extent[2];
  w.n_cells = step.in[0].shape.extent[2];
  if (run.neighbours.norm != nullptr) set_norm(w.norm, *run.neighbours.norm);
  if (run.neighbours.rope != nullptr) set_rotation(w.rotation, *run.neighbours.rope);
  if (w.norm.used || w.rotation.used) {
    const auto n = static_cast<size_t>(w.planes[0].n + w.planes[1].n);
    launch(run, cache_write_row_kernel, dim3(static_cast<unsigned>(w.n_tokens)), dim3(kThreads),
           n * sizeof(float), w);
    return;
  }
  const auto n_blocks = static_cast<unsigned>((w.n_tokens + kTokens - 1) / kTokens);
  launch(run, cache_write_kernel, dim3(n_blocks), dim3(kThreads), 0, w);
}

}  // namespace

const CudaOp cache_write_op = {refusal, no_scratch, run_cache_write};

}  // namespace mla::cuda
