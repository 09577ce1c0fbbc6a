#include "backends/cuda/dequantize.h"

#include <algorithm>

#include "backends/cuda/kernels/dequantize.cuh"
#include "base/error.h"

namespace mla::cuda {
namespace {

unsigned dim(int64_t n) { return static_cast<unsigned>(n); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t n_rows_of(const View& x) { return x.extent[0] * x.extent[1] * x.extent[2]; }

bool is_plain(Format format) { return !traits(format).quantized; }

void check_padding(const char* what, int64_t n, int64_t padded) {
  MLA_CHECK_SHAPE(padded >= n && padded % 8 == 0 && padded <= int64_t{1} << 30, what, ": rows of ",
                  n, " elements cannot be padded to ", padded);
}

void check_operand(const char* what, Format format, Operand operand) {
  MLA_CHECK(UnsupportedError, is_plain(format) || operand == Operand::f16, what, ": ",
            format_name(format), " is multiplied as f16 only");
}

template <Format F>
void dequantize(const CudaRun& run, const DequantizeArgs& a) {
  const int64_t threads = int64_t{a.n_rows} * a.quads * 4;
  launch(run, dequantize_packed<F>, dim3(dim(ceil_div(threads, kDequantizeThreads))),
         dim3(kDequantizeThreads), 0, a);
}

void dequantize(const CudaRun& run, const DequantizeArgs& a) {
  switch (a.w.format) {
#define MLA_FORMAT(name, gguf, elems, bytes) \
  case Format::name:                         \
    return dequantize<Format::name>(run, a);
#include "quant/formats.def"
    default:
      break;
  }
}

// Rows of one launch: its threads, 4 per 128 elements, are counted in 32 bits.
int64_t most_rows(int64_t quads) { return (int64_t{1} << 30) / (4 * std::max<int64_t>(quads, 1)); }

void convert(const CudaRun& run, const ConvertArgs& a, Operand operand) {
  auto* kernel = operand == Operand::f16 ? convert_rows<__half> : convert_rows<__nv_bfloat16>;
  launch(run, kernel, dim3(dim(ceil_div(a.n_chunks, kDequantizeThreads))), dim3(kDequantizeThreads),
         0, a);
}

ConvertArgs convert_args(const View& x, int64_t first_row, int64_t n_rows, void* out,
                         int64_t k_padded) {
  return {x,
          first_row,
          n_rows * (k_padded / 8),
          static_cast<int>(x.extent[3]),
          static_cast<int>(k_padded),
          fours_are_aligned(x.data, x.format, x.stride),
          static_cast<uint16_t*>(out)};
}

template <Format F, class Element>
void transpose(const CudaRun& run, const TransposeArgs& a) {
  const dim3 grid(dim(ceil_div(a.k, kDecodeGroup)), dim(ceil_div(a.r_padded, kTransposeRows)),
                  dim(a.w.extent[0] * a.w.extent[1]));
  launch(run, dequantize_turned<F, Element>, grid, dim3(kTransposeRows), 0, a);
}

template <class Element>
void transpose_plain(const CudaRun& run, const TransposeArgs& a) {
  if (a.w.format == Format::F32) return transpose<Format::F32, Element>(run, a);
  if (a.w.format == Format::F16) return transpose<Format::F16, Element>(run, a);
  transpose<Format::BF16, Element>(run, a);
}

}  // namespace

void dequantize_rows(const CudaRun& run, const View& w, int64_t begin, int64_t end, Operand operand,
                     void* out, int64_t k_padded) {
  MLA_CHECK_SHAPE(begin >= 0 && begin <= end && end <= n_rows_of(w), "dequantize_rows: rows ",
                  begin, " to ", end, " of ", n_rows_of(w));
  check_padding("dequantize_rows", w.extent[3], k_padded);
  check_operand("dequantize_rows", w.format, operand);
  if (is_plain(w.format)) {
    return convert(run, convert_args(w, begin, end - begin, out, k_padded), operand);
  }
  const int64_t k = w.extent[3], quads = ceil_div(k_padded, 128);
  auto* at = static_cast<uint16_t*>(out);
  for (int64_t n_rows = 0; begin < end; begin += n_rows, at += n_rows * k_padded) {
    n_rows = std::min(end - begin, most_rows(quads));
    dequantize(run, {w, rows_are_uniform(w), begin, static_cast<int>(n_rows),
                     static_cast<int>(k / kDecodeGroup),
                     static_cast<int>(k / traits(w.format).block_elems), static_cast<int>(quads),
                     static_cast<int>(k_padded), at});
  }
}

void dequantize_transposed(const CudaRun& run, const View& w, Operand operand, void* out,
                           int64_t r_padded) {
  check_padding("dequantize_transposed", w.extent[2], r_padded);
  check_operand("dequantize_transposed", w.format, operand);
  const TransposeArgs a = {w,
                           static_cast<int>(w.extent[2]),
                           static_cast<int>(w.extent[3]),
                           static_cast<int>(w.extent[3] / traits(w.format).block_elems),
                           static_cast<int>(r_padded),
                           static_cast<uint16_t*>(out)};
  if (is_plain(w.format)) {
    if (operand == Operand::f16) return transpose_plain<__half>(run, a);
    return transpose_plain<__nv_bfloat16>(run, a);
  }
  switch (w.format) {
#define MLA_FORMAT(name, gguf, elems, bytes) \
  case Format::name:                         \
    return transpose<Format::name, __half>(run, a);
#include "quant/formats.def"
    default:
      break;
  }
}

void prepare_rows(const CudaRun& run, const View& x, Operand operand, void* out, float* row_scale,
                  int64_t k_padded) {
  check_padding("prepare_rows", x.extent[3], k_padded);
  const int64_t n_rows = n_rows_of(x);
  // A thread has 8 elements or more, as far as there are.
  const int64_t warps =
      std::clamp<int64_t>(k_padded / 8 / kWarpThreads, 1, kDequantizeThreads / kWarpThreads);
  auto* kernel = operand == Operand::f16 ? prepare<__half> : prepare<__nv_bfloat16>;
  launch(run, kernel, dim3(dim(n_rows)), dim3(dim(warps * kWarpThreads)), 0,
         convert_args(x, 0, n_rows, out, k_padded), row_scale);
}

}  // namespace mla::cuda
