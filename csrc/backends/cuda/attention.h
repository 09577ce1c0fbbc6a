// Operands of mla_attention as its kernels take them, and the three ways to compute it.
// Letters: T tokens, H heads, C latent, N/R/V head dims (nope, rope, value).
//
// Spans, cells and the block table are values that only the device knows: a step is recorded once
// and replayed while contexts grow. Grids follow from shapes and from the number of SMs; kernels
// divide the work among their blocks by the spans they find.
#pragma once

#include "backends/cuda/cuda_op.h"
#include "graph/ops.h"

namespace mla::cuda {

// One plane of the cache: rows in the layout of the format, as the host has them.
struct CachePlane {
  const std::byte* data;
  int64_t cell_bytes;  // from one cell to the next
  Format format;
  int width;
};

// The rotation of q_rope, where attention takes it over (fusion.h).
struct QueryRotation {
  const std::byte *positions, *frequencies;  // null: it has been done
  int64_t position_stride, frequency_stride;
  float scale;
};

// By value to kernels.
struct AttentionArgs {
  int t, h, n, r, c, v;
  float scale;
  bool k_b_transposed;
  // Spans and block table come from outside the graph: kernels may read them before pdl_wait(), as
  // whatever copies them in has ended before any kernel behind it starts.
  bool spans_given;
  bool q_fours;         // whole groups of q_nope, in 16-byte pieces
  View q_nope, q_rope;  // [T, H, N], [T, H, R] in dims 1, 2, 3
  QueryRotation rotation;
  bool queries_wait_last;  // their kernel, see Overlap
  CachePlane latent, rope;
  int64_t n_cells;  // of the cache
  View k_b, v_b;    // [H, C, N] (transposed: [H, N, C]), [H, V, C] in dims 1, 2, 3; packed rows
  const int32_t* spans;
  int64_t span_stride;  // in int32, as is table_stride
  int n_spans;          // rows of the tensor; the list may end earlier
  const int32_t* table;
  int64_t table_stride;
  int n_sequences, n_blocks, block_cells;
  float* out;  // [T, H, V], contiguous
};
AttentionArgs attention_args(const Node& node, const Step* step);  // without a step: no memory
void set_rotation(AttentionArgs& args, const Step& rope);
inline AttentionArgs attention_args(const Step& step) { return attention_args(*step.node, &step); }

// Whether the step rotates its queries itself, and its first kernel can wait last.
bool attention_takes_rope(const Node& node, const DeviceInfo& device);

// attention_exact.cu: float32 throughout, every cache format and stride. spans: those to compute;
// where they are not the expanded ones alone, tokens in no span become zeros as well.
bool exact_fits(const Node& node, const DeviceInfo& device);
size_t exact_scratch_bytes(const Node& node);
void attention_exact(const Step& step, const CudaRun& run, Contraction spans);

// attention_absorbed.cu: the spans that are not `expanded`; zeros where a token is in no span.
bool absorbed_fits(const Node& node, const DeviceInfo& device);
size_t absorbed_scratch_bytes(const Node& node, const DeviceInfo& device);
void attention_absorbed(const Step& step, const CudaRun& run);

// attention_expanded.cu: the spans that are `expanded`; other rows are left alone.
size_t expanded_scratch_bytes(const Node& node, const DeviceInfo& device);
void attention_expanded(const Step& step, const CudaRun& run);

}  // namespace mla::cuda
