// Operands of gemm.h from tensors: weights and activations as rows of 16-bit numbers.
//
// Rows are those of the last dim, counted over all leading dims, outermost first. A row of K
// elements becomes k_padded (a multiple of 8, at least K) of which those from K on are zero.
#pragma once

#include <cstdint>

#include "backends/cuda/gemm.h"

namespace mla::cuda {

// What a weight of this format is multiplied as: nothing of its range is lost.
constexpr Operand operand_of(Format format) {
  return format == Format::F32 || format == Format::BF16 ? Operand::bf16 : Operand::f16;
}

constexpr int64_t pad_k(int64_t k) { return (k + 7) / 8 * 8; }

// Rows [begin, end) of w [.., N, K] (quantized: packed, as packed.h says; else any strides) ->
// out [end - begin, k_padded]. Quantized weights give f16 alone.
void dequantize_rows(const CudaRun& run, const View& w, int64_t begin, int64_t end, Operand operand,
                     void* out, int64_t k_padded);

// w [.., R, K] -> out [.., K, r_padded], each matrix transposed; columns from R on are zero.
void dequantize_transposed(const CudaRun& run, const View& w, Operand operand, void* out,
                           int64_t r_padded);

// x [.., M, K] F32, F16 or BF16, any strides -> out [rows, k_padded] and row_scale [rows].
// f16: out = x / row_scale, the scale a power of two that puts the row's largest magnitude in
// [2^14, 2^15), so that no row overflows; bf16: out = x, row_scale (may be null) = 1.
void prepare_rows(const CudaRun& run, const View& x, Operand operand, void* out, float* row_scale,
                  int64_t k_padded);

}  // namespace mla::cuda
