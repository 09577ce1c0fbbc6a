// Which kernels a product runs on.
//
//   exact                                float32 kernels, whatever the shape
//   fast, one row of x                   matvec.h: integers
//   fast, few rows of x per matrix       small_batch.h: weights are streamed once
//   fast, many rows                      product_gemm.h: weights are decoded, then tensor cores
//   packed weights across their rows, F32 and scattered weights of few rows, nothing along k: exact
//
// The halves of a swiglu whose weights differ in format are products of their own, the second of
// which multiplies what the first left.
#include <algorithm>

#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/product_gemm.h"
#include "backends/cuda/product_kernels.h"

namespace mla::cuda {
namespace {

// Columns up to which the warps of a block divide k: 8 blocks of as many columns for each of the
// 132 multiprocessors of a large device are more than it needs.
constexpr int64_t kNarrow = 2048;
// Rows from which a tile of kExactRows is worth its idle part.
constexpr int64_t kManyRows = 3;
// Rows of x from which plain weights that are not read in pieces (F32, or of odd strides) are worth
// a copy in 16 bits.
constexpr int64_t kManyPlainRows = kMaxSmallRows;

enum class Path { exact, matvec, small_batch, gemm };

Path path_of(const Product& p, Precision precision, const DeviceInfo& device) {
  if (precision == Precision::exact || p.k == 0 || p.w.transposed) return Path::exact;
  if (matvec_fits(p, device)) return Path::matvec;
  if (small_batch_fits(p, device)) return Path::small_batch;
  const int64_t rows = p.routed ? p.n_rows() : p.rows_per_matrix();
  if (rows <= kManyPlainRows && !traits(p.w.format).quantized) return Path::exact;
  return product_gemm_fits(p) ? Path::gemm : Path::exact;
}

Product half(const Product& p, bool second) {
  Product one = p;
  one.swiglu = false;
  if (second) one.w = p.up;
  return one;
}

// Both halves by kernels for few rows, but not by one.
bool halves_fit(const Product& p, const DeviceInfo& device) {
  return p.swiglu && p.w.format != p.up.format && small_batch_fits(half(p, false), device) &&
         small_batch_fits(half(p, true), device);
}

void run_exact_across(const CudaRun& run, const Product& p, Finish finish) {
  const int64_t blocks = p.n_rows() * (p.n / 32);
  launch(run, product_kernels(p.w.format).exact_across, dim3(static_cast<unsigned>(blocks)),
         dim3(kExactThreads), 0, p, finish);
}

void run_exact(const CudaRun& run, const Product& p, Finish finish) {
  if (p.w.transposed) return run_exact_across(run, p, finish);
  const ProductKernels& kernels = product_kernels(p.w.format);
  const int64_t x_strides[4] = {p.x_stride[0], p.x_stride[1], p.x_stride[2], p.x_step};
  const int64_t w_strides[4] = {p.w.matrix_stride[0], p.w.matrix_stride[1], p.w.row_stride,
                                p.w.step};
  const bool many = !p.routed && p.rows_per_matrix() >= kManyRows;
  const int n_rows = many ? kExactRows : 1;
  const int64_t n_matrices = p.routed ? p.n_results() : int64_t{p.n_matrices[0]} * p.n_matrices[1];
  ExactRun r;
  r.finish = finish;
  r.waits_last = run.overlap == Overlap::waits_last;
  const bool x_in_fours = p.norm.used || fours_are_aligned(p.x, p.x_format, x_strides);
  r.fours = p.k % 4 == 0 && x_in_fours &&
            (traits(p.w.format).quantized || fours_are_aligned(p.w.data, p.w.format, w_strides));
  r.split = (p.routed ? p.n : n_matrices * p.n) <= kNarrow ? kExactWarps : 1;
  r.n_row_tiles = p.routed ? 1 : static_cast<int>((p.rows_per_matrix() + n_rows - 1) / n_rows);
  const int columns = kExactWarps / r.split * (many ? kernels.columns : 1);
  const int64_t blocks = n_matrices * r.n_row_tiles * ((p.n + columns - 1) / columns);
  const size_t staged = p.norm.used ? sizeof(float) * static_cast<size_t>(p.k) : 0;
  launch(run, many ? kernels.exact_many : kernels.exact_one, dim3(static_cast<unsigned>(blocks)),
         dim3(kExactThreads), staged, p, r);
}

// A block for each column of one row, or the norm would be taken too often.
bool exact_takes_norm(const Product& p, const DeviceInfo& device) {
  return !p.w.transposed && !p.swiglu && p.n <= kNarrow &&
         sizeof(float) * static_cast<size_t>(p.k) <= device.smem_per_block / 4;
}

}  // namespace

bool product_takes_norm(const Step& step, const Step& norm, const DeviceInfo& device) {
  const bool constant =
      norm.in[1].data == nullptr || root_of(norm.node->input(1)).node->op == Op::weight;
  Product p = product_of(step);
  take_norm(p, norm);
  const int64_t n_rows_of_x = p.slots_share_x() ? 1 : p.n_rows();
  if (!constant || n_rows_of_x != 1 || norm.out.shape.n_elems() != p.k) return false;
  switch (path_of(p, product_precision(step), device)) {
    case Path::matvec:
      return true;
    case Path::exact:
      return exact_takes_norm(p, device);
    default:
      return false;
  }
}

bool product_waits_last(const Step& step, const DeviceInfo& device) {
  const Product p = product_of(step);
  if (p.n_results() * p.n == 0) return false;
  const Path path = path_of(p, product_precision(step), device);
  return path == Path::matvec || (path == Path::exact && !p.w.transposed && !p.swiglu);
}

size_t product_scratch_bytes(const Product& p, Precision precision, const DeviceInfo& device) {
  if (p.n_results() * p.n == 0) return 0;
  size_t bytes = 0;
  if (halves_fit(p, device)) {
    bytes = std::max(small_batch_scratch_bytes(half(p, false), device),
                     small_batch_scratch_bytes(half(p, true), device));
  }
  const Path path = path_of(p, precision, device);
  // Where x turns out to lie at an odd address, a product of one row runs as one of few.
  if (path == Path::small_batch || (path == Path::matvec && small_batch_fits(p, device))) {
    bytes = std::max(bytes, small_batch_scratch_bytes(p, device));
  }
  // Plain weights may turn out to lie at odd addresses.
  const bool plain = !traits(p.w.format).quantized || (p.swiglu && !traits(p.up.format).quantized);
  const bool may_leave = (plain && path == Path::small_batch) ||
                         (path == Path::matvec && !small_batch_fits(p, device));
  if (path == Path::gemm || (may_leave && product_gemm_fits(p))) {
    bytes = std::max(bytes, product_gemm_scratch_bytes(p, device));
  }
  return bytes;
}

void run_product(const CudaRun& run, const Product& p, Precision precision) {
  if (p.n_results() * p.n == 0) return;
  if (precision == Precision::fast && halves_fit(p, run.device)) {
    run_small_batch(run, half(p, false), Finish::store);
    run_small_batch(run, half(p, true), Finish::multiply);
    return;
  }
  switch (path_of(p, precision, run.device)) {
    case Path::matvec:
      return run_matvec(run, p);
    case Path::small_batch:
      return run_small_batch(run, p, Finish::store);
    case Path::gemm:
      return run_product_gemm(run, p);
    default:
      run_exact(run, half(p, false), Finish::store);
      if (p.swiglu) run_exact(run, half(p, true), Finish::multiply);
  }
}

void run_product(const Step& step, const CudaRun& run) {
  Product p = product_of(step);
  if (run.neighbours.norm != nullptr) take_norm(p, *run.neighbours.norm);
  run_product(run, p, product_precision(step));
}

}  // namespace mla::cuda
