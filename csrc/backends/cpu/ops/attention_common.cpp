#include "backends/cpu/ops/attention_common.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "quant/blocks.h"

namespace mla::cpu {

void HeadProduct::pack_row(const std::byte* x, int64_t stride_bytes, std::byte* packed,
                           int64_t row) const {
  std::byte* out = packed + row * packed_bytes;
  if (fold == 1) return pack(x, Format::F32, stride_bytes, k, out);
  for (int64_t i = 0; i < fold; ++i) {
    float folded[block::kSuper] = {};
    for (int64_t j = 0; j < k; ++j) {
      std::memcpy(folded + i * k + j, x + j * stride_bytes, sizeof(float));
    }
    pack(reinterpret_cast<const std::byte*>(folded), Format::F32, sizeof(float), block::kSuper,
         out + i * packed_bytes / fold);
  }
}

// Some rows of the weight at a time; what they give lies apart in y.
void HeadProduct::apply_folded(const std::byte* w, int64_t w_row_bytes, const std::byte* packed,
                               float* y, int64_t y_row, int64_t n_rows) const {
  constexpr int64_t kColumns = 64;
  float results[kProductRows][kColumns];
  const std::byte* x_rows[kProductRows];
  float* y_rows[kProductRows];
  const int64_t n_x = n_rows * fold;
  for (int64_t i = 0; i < n_x; ++i) {
    x_rows[i] = packed + i * (packed_bytes / fold);
    y_rows[i] = results[i];
  }
  for (int64_t first = 0; first < n / fold; first += kColumns) {
    const int64_t size = std::min(kColumns, n / fold - first);
    kernel({w + first * fold * w_row_bytes, fold * w_row_bytes, 0, size, fold * k, x_rows, y_rows,
            static_cast<int>(n_x), false});
    for (int64_t i = 0; i < n_x; ++i) {
      float* out = y + i / fold * y_row + first * fold + i % fold;
      for (int64_t j = 0; j < size; ++j) out[j * fold] = results[i][j];
    }
  }
}

void HeadProduct::apply(const Tensor& weight, int64_t head, const std::byte* packed, float* y,
                        int64_t y_row, int64_t n_rows) const {
  if (fold > 1) {
    const int64_t most = kProductRows / fold;
    for (int64_t i = 0; i < n_rows; i += most) {
      apply_folded(weight.at(0, head, 0), weight.stride[2], packed + i * packed_bytes,
                   y + i * y_row, y_row, std::min(most, n_rows - i));
    }
    return;
  }
  const std::byte* x_rows[kProductRows];
  float* y_rows[kProductRows];
  for (int64_t i = 0; i < n_rows; ++i) {
    x_rows[i] = packed + i * packed_bytes;
    y_rows[i] = y + i * y_row;
  }
  kernel({weight.at(0, head, 0), weight.stride[2], 0, n, k, x_rows, y_rows,
          static_cast<int>(n_rows), false});
}

HeadProduct head_product(const KernelTable& kernels, const Layout& weight, bool across,
                         Precision precision) {
  const MatmulTable& table = *kernels.matmul;
  const auto format = static_cast<size_t>(weight.format);
  const MatmulEntry& rows = table.rows[format][static_cast<size_t>(precision)];
  const Packing packing = across ? Packing::f32 : rows.packing;
  HeadProduct product;
  product.kernel = across ? table.across[format] : rows.kernel;
  product.pack = table.pack[static_cast<size_t>(packing)];
  product.n = across ? weight.dim(2) : weight.dim(1);
  product.k = across ? weight.dim(1) : weight.dim(2);
  if (packing == Packing::q8 && product.k > 0 && block::kSuper % product.k == 0 &&
      product.n % (block::kSuper / product.k) == 0 &&
      weight.stride[2] == row_bytes(weight.format, product.k)) {
    product.fold = block::kSuper / product.k;
  }
  // Whole cache lines: rows packed by different threads share none.
  const size_t bytes = table.packed_bytes(packing, product.fold * product.k);
  product.packed_bytes = product.fold * static_cast<int64_t>((bytes + 63) / 64 * 64);
  return product;
}

// Whether a fast product with such a weight takes activations as bytes.
static bool is_bytes(const KernelTable& kernels, const Layout& weight) {
  const auto format = static_cast<size_t>(weight.format);
  return kernels.matmul->rows[format][static_cast<size_t>(Precision::fast)].packing == Packing::q8;
}

AttentionShape attention_shape(const Node& node, const KernelTable& kernels, int n_threads) {
  const Layout& q_nope = node.input(0)->layout;
  const Layout& k_b = node.input(4)->layout;
  const Layout& v_b = node.input(5)->layout;
  const auto& attrs = node.attr<AttentionAttrs>();
  AttentionShape s;
  s.t = q_nope.dim(0);
  s.h = q_nope.dim(1);
  s.n = q_nope.dim(2);
  s.r = node.input(1)->dim(2);
  s.v = v_b.dim(1);
  s.c = v_b.dim(2);
  s.cp = pad_floats(s.c);
  s.rp = pad_floats(s.r);
  s.np = pad_floats(s.n);
  s.vp = pad_floats(s.v);
  // Beside what quantized weights and their rounded activations cost, queries and cells of 8 bits
  // of mantissa cost nothing. Of a model of floats they would be half of the error: all is exact.
  const bool rounded =
      attrs.precision == Precision::fast && is_bytes(kernels, k_b) && is_bytes(kernels, v_b);
  const Precision precision = rounded ? Precision::fast : Precision::exact;
  s.q_latent = head_product(kernels, k_b, attrs.k_b_transposed, precision);
  s.value = head_product(kernels, v_b, false, precision);
  s.absorbed = kernels.attention->absorbed[static_cast<size_t>(precision)];
  s.expanded = kernels.attention->expanded[static_cast<size_t>(precision)];
  s.n_threads = n_threads;
  return s;
}

Span AttentionCall::span(int64_t i) const {
  Span span;
  std::memcpy(&span, step.in[6].at(0, 0, i), sizeof span);
  return span;
}

CacheCells AttentionCall::cells(const Span& span) const {
  const Tensor& latent = step.in[2];
  const Tensor& rope = step.in[3];
  const std::byte* blocks = step.in[7].at(0, 0, span.sequence);
  return {{latent.data, latent.stride[2], latent.format, shape.c},
          {rope.data, rope.stride[2], rope.format, shape.r},
          reinterpret_cast<const int32_t*>(blocks),
          attrs.block_cells,
          span.first_cell};
}

int AttentionCall::part_of(const Span& span, int64_t begin) const {
  const Tensor& plane = step.in[2];
  if (plane.slices == nullptr) return -1;
  const int64_t cell = span.first_cell + begin;
  const int32_t* blocks = cells(span).blocks;
  const int64_t row =
      blocks[cell / attrs.block_cells] * int64_t{attrs.block_cells} + cell % attrs.block_cells;
  return plane.slices->find(plane.slices_offset + row * plane.stride[2]).part;
}

namespace {

void check_blocks(const AttentionCall& call, int64_t index, const Span& span) {
  const Tensor& table = call.step.in[7];
  const int64_t block_cells = call.attrs.block_cells;
  const int64_t n_cache = call.step.in[2].dim(0);
  const int64_t end = int64_t{span.first_cell} + span.n_cells;
  MLA_CHECK_SHAPE(end <= table.dim(1) * block_cells, "mla_attention: span ", index, ": first_cell ",
                  span.first_cell, " + n_cells ", span.n_cells, ", accepted is at most ",
                  table.dim(1), " blocks of ", block_cells);
  const int32_t* blocks = call.cells(span).blocks;
  for (int64_t b = span.first_cell / block_cells; b * block_cells < end; ++b) {
    const int64_t used = std::min(end - b * block_cells, block_cells);
    MLA_CHECK_SHAPE(blocks[b] >= 0 && blocks[b] * block_cells + used <= n_cache,
                    "mla_attention: span ", index, ": block_table[", span.sequence, "][", b,
                    "] is ", blocks[b], " and ", used, " of its ", block_cells,
                    " cells are read, the cache has ", n_cache, " cells");
  }
}

void check_span(const AttentionCall& call, int64_t index, const Span& span) {
  const int64_t n_sequences = call.step.in[7].dim(0);
  MLA_CHECK_SHAPE(span.sequence >= 0 && span.sequence < n_sequences, "mla_attention: span ", index,
                  ": sequence ", span.sequence, ", the block table has ", n_sequences);
  MLA_CHECK_SHAPE(span.n_tokens > 0 && span.first_token >= 0 &&
                      int64_t{span.first_token} + span.n_tokens <= call.shape.t,
                  "mla_attention: span ", index, ": first_token ", span.first_token, ", n_tokens ",
                  span.n_tokens, ", there are ", call.shape.t, " tokens");
  MLA_CHECK_SHAPE(span.n_cells >= span.n_tokens && span.first_cell >= 0, "mla_attention: span ",
                  index, ": n_cells ", span.n_cells, ", first_cell ", span.first_cell,
                  ", accepted is n_cells >= n_tokens (", span.n_tokens, ") and first_cell >= 0");
  check_blocks(call, index, span);
}

}  // namespace

int64_t check_spans(const AttentionCall& call, uint8_t* marks) {
  const int64_t n_rows = call.step.in[6].dim(0);
  std::fill(marks, marks + call.shape.t, uint8_t{0});
  int64_t n_spans = 0;
  for (; n_spans < n_rows; ++n_spans) {
    const Span span = call.span(n_spans);
    if (span.n_tokens == 0) break;
    check_span(call, n_spans, span);
    for (int64_t t = span.first_token; t < span.first_token + span.n_tokens; ++t) {
      MLA_CHECK_SHAPE(marks[t] == 0, "mla_attention: span ", n_spans, ": token ", t,
                      " is in an earlier span as well");
      marks[t] = 1;
    }
  }
  const int64_t row = call.shape.h * call.shape.v;
  for (int64_t t = 0; t < call.shape.t; ++t) {
    if (marks[t] == 0) std::fill_n(call.out(t, 0), row, 0.0f);
  }
  return n_spans;
}

}  // namespace mla::cpu
