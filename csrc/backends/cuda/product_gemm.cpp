// Products of many rows: operands as rows of 16-bit numbers in scratch memory, then gemm.h.
//
// Weights are decoded piece by piece, matrices or rows of one, into a buffer of bounded size; rows
// of x are converted once. Routed rows are put in order of their expert first.
#include "backends/cuda/product_gemm.h"

#include <algorithm>

#include "backends/cuda/dequantize.h"
#include "backends/cuda/expert_sort.h"
#include "backends/cuda/gemm.h"
#include "backends/cuda/product_finish.h"
#include "backends/cuda/room.h"

namespace mla::cuda {
namespace {

// Decoded weights at a time: the largest matrix of the models we know is 250 MB, and a GPU's share
// of work fits many times below that.
constexpr int64_t kDecodedBytes = int64_t{256} << 20;
// Products of pairs waiting to be summed: more tokens are taken in several turns.
constexpr int64_t kPairBytes = int64_t{512} << 20;

View x_view(const Product& p) {
  View v{const_cast<std::byte*>(p.x), p.x_format, {}, {}};
  for (int i = 0; i < 3; ++i) {
    v.extent[i] = p.extent[i];
    v.stride[i] = p.x_stride[i];
  }
  if (p.slots_share_x()) v.extent[2] = 1;
  v.extent[3] = p.k;
  v.stride[3] = p.x_step;
  return v;
}

View w_view(const Product& p, const Weight& w) {
  return View{const_cast<std::byte*>(w.data),
              w.format,
              {p.n_matrices[0], p.n_matrices[1], p.n, p.k},
              {w.matrix_stride[0], w.matrix_stride[1], w.row_stride, w.step}};
}

bool adds_contiguous_residual(const Product& p) {
  return p.has_residual && p.residual_step == 4 && p.residual_stride[2] == 4 * int64_t{p.n} &&
         (p.extent[1] == 1 || p.residual_stride[1] == p.residual_stride[2] * p.extent[2]) &&
         (p.extent[0] == 1 || p.residual_stride[0] == p.residual_stride[1] * p.extent[1]);
}

// Two formats whose 16-bit types differ cannot share rows of x: the halves of the swiglu follow
// each other then.
bool fused(const Product& p) {
  return p.swiglu && operand_of(p.w.format) == operand_of(p.up.format);
}

// One pass over a matrix or two fused ones.
struct Pass {
  Product product;  // swiglu only where fused
  Operand operand;
  int64_t k_padded, ldb;
  int64_t rows_at_once;      // of a matrix, decoded; all n where whole matrices are
  int64_t matrices_at_once;  // 1 where rows are fewer than n
  void* x = nullptr;
  float* scales = nullptr;
  std::byte* w = nullptr;
  std::byte* up = nullptr;
  std::byte* gemm_scratch = nullptr;
  size_t gemm_bytes = 0;  // of it
  int* offsets = nullptr;
  int* sorted = nullptr;
  float* pairs = nullptr;  // products waiting for their sum
  int tokens_at_once = 0;  // routed

  Pass(const Product& p, const DeviceInfo& device, Room& room)
      : product(p), operand(operand_of(p.w.format)), k_padded(pad_k(p.k)), ldb(k_padded) {
    const int64_t n_operands = p.swiglu ? 2 : 1;
    const int64_t fit = std::max<int64_t>(kDecodedBytes / (2 * k_padded * n_operands), 1);
    rows_at_once = std::min<int64_t>(p.n, fit);
    const int64_t n_matrices = p.routed ? p.n_experts : p.n_matrices[1];
    matrices_at_once = rows_at_once < p.n
                           ? 1
                           : std::clamp<int64_t>(fit / p.n, 1, std::max<int64_t>(n_matrices, 1));
    const int64_t n_x = p.slots_share_x() ? p.extent[1] : p.n_rows();
    x = room.take<uint16_t>(n_x * k_padded);
    scales = room.take<float>(n_x);
    const int64_t decoded = rows_at_once * matrices_at_once * k_padded;
    w = reinterpret_cast<std::byte*>(room.take<uint16_t>(decoded));
    if (p.swiglu) up = reinterpret_cast<std::byte*>(room.take<uint16_t>(decoded));
    if (p.routed) {
      tokens_at_once = p.extent[1];
      if (p.summed) {
        const int64_t of_token = int64_t{4} * p.extent[2] * p.n;
        tokens_at_once =
            static_cast<int>(std::clamp<int64_t>(kPairBytes / of_token, 1, p.extent[1]));
        pairs = room.take<float>(int64_t{tokens_at_once} * p.extent[2] * p.n);
      }
      offsets = room.take<int>(p.n_experts + 1);
      sorted = room.take<int>(int64_t{tokens_at_once} * p.extent[2]);
    } else {
      gemm_bytes = gemm_scratch_bytes(dense(0, rows_at_once, 1), device);
      gemm_scratch = room.take<std::byte>(static_cast<int64_t>(gemm_bytes));
    }
  }

  // Rows of x that follow each other and meet matrices which do, from matrix m1 of batch 0 on.
  Gemm dense(int64_t first_row, int64_t n_rows, int64_t n_matrices) const {
    Gemm g;
    g.operand = operand;
    g.m = product.ratio[1] * product.extent[2];
    if (product.n_matrices[1] == 1) g.m *= product.ratio[0];
    g.n = static_cast<int>(n_rows);
    g.k = static_cast<int>(k_padded);
    g.lda = k_padded;
    g.ldb = ldb;
    g.ldc = product.n;
    g.n_batch = static_cast<int>(n_matrices);
    g.batch_a = g.m * k_padded;
    g.batch_b = product.n * k_padded;
    g.batch_c = g.batch_residual = int64_t{g.m} * product.n;
    g.batch_scale = g.m;
    g.a = static_cast<const uint16_t*>(x);
    g.b = w;
    g.b_up = product.swiglu ? up : nullptr;
    g.row_scale = operand == Operand::f16 ? scales : nullptr;
    g.c = product.out == nullptr ? nullptr : product.out + first_row;
    g.scratch = gemm_scratch;
    g.scratch_bytes = gemm_bytes;
    return g;
  }
};

void decode(const CudaRun& run, const Pass& pass, int64_t first_matrix, int64_t n_matrices,
            int64_t first_row, int64_t n_rows) {
  const Product& p = pass.product;
  const int64_t begin = first_matrix * p.n + first_row;
  const int64_t end = begin + (n_matrices - 1) * p.n + n_rows;
  dequantize_rows(run, w_view(p, p.w), begin, end, pass.operand, pass.w, pass.k_padded);
  if (p.swiglu) {
    dequantize_rows(run, w_view(p, p.up), begin, end, pass.operand, pass.up, pass.k_padded);
  }
}

// Rows [first, first + n_rows) of matrices [m1, m1 + n_matrices) of batch m0, against all their x.
void multiply_dense(const CudaRun& run, const Pass& pass, int64_t m0, int64_t m1,
                    int64_t n_matrices, int64_t first, int64_t n_rows) {
  const Product& p = pass.product;
  decode(run, pass, m0 * p.n_matrices[1] + m1, n_matrices, first, n_rows);
  const bool together = p.n_matrices[1] == 1;  // all rows of the batch meet one matrix
  for (int64_t i = 0; i < (together ? 1 : p.ratio[0]); ++i) {
    Gemm g = pass.dense(first, n_rows, n_matrices);
    const int64_t i0 = m0 * p.ratio[0] + i;
    const int64_t row = (i0 * p.extent[1] + m1 * p.ratio[1]) * p.extent[2];
    g.a = static_cast<const uint16_t*>(pass.x) + row * pass.k_padded;
    if (g.row_scale != nullptr) g.row_scale += row;
    g.c = p.out + row * p.n + first;
    if (p.has_residual) {
      g.residual = adds_contiguous_residual(p)
                       ? reinterpret_cast<const float*>(p.residual) + row * p.n + first
                       : static_cast<const float*>(g.c);
      g.ld_residual = p.n;
    }
    gemm(run, g);
  }
}

void run_dense(const CudaRun& run, const Pass& pass) {
  const Product& p = pass.product;
  prepare_rows(run, x_view(p), pass.operand, pass.x, pass.scales, pass.k_padded);
  if (p.has_residual && !adds_contiguous_residual(p)) copy_residual(run, p);
  for (int64_t m0 = 0; m0 < p.n_matrices[0]; ++m0) {
    for (int64_t m1 = 0; m1 < p.n_matrices[1]; m1 += pass.matrices_at_once) {
      const int64_t n = std::min<int64_t>(pass.matrices_at_once, p.n_matrices[1] - m1);
      for (int64_t row = 0; row < p.n; row += pass.rows_at_once) {
        multiply_dense(run, pass, m0, m1, n, row, std::min<int64_t>(pass.rows_at_once, p.n - row));
      }
    }
  }
}

// The product of some tokens alone, in their own numbering.
Product some_tokens(const Product& p, int first, int n_tokens) {
  Product out = p;
  out.extent[1] = n_tokens;
  out.x += first * p.x_stride[1];
  out.ids += first * p.id_stride[0];
  if (p.summed) out.weights += first * p.weight_stride[0];
  if (p.has_residual) out.residual += first * p.residual_stride[1];
  out.out += int64_t{first} * (p.summed ? 1 : p.extent[2]) * p.n;
  return out;
}

View ids_view(const Product& p) {
  return View{const_cast<std::byte*>(p.ids),
              Format::I32,
              {1, 1, p.extent[1], p.extent[2]},
              {0, 0, p.id_stride[0], p.id_stride[1]}};
}

// Experts' matrices are decoded some at a time, or, where one is larger than the buffer, by rows.
void multiply_experts(const CudaRun& run, const Pass& pass, const Product& p, const void* x,
                      const float* scales, float* out) {
  for (int64_t e = 0; e < p.n_experts; e += pass.matrices_at_once) {
    const int64_t n_experts = std::min<int64_t>(pass.matrices_at_once, p.n_experts - e);
    for (int64_t row = 0; row < p.n; row += pass.rows_at_once) {
      const int64_t n_rows = std::min<int64_t>(pass.rows_at_once, p.n - row);
      decode(run, pass, e, n_experts, row, n_rows);
      GroupedGemm g;
      g.operand = pass.operand;
      g.n_rows = static_cast<int>(p.n_rows());
      g.n = static_cast<int>(n_rows);
      g.k = static_cast<int>(pass.k_padded);
      g.first_expert = static_cast<int>(e);
      g.n_experts = static_cast<int>(n_experts);
      g.n_model_experts = p.n_experts;
      g.offsets = pass.offsets;
      g.sorted_pairs = pass.sorted;
      g.a = x;
      g.lda = pass.k_padded;
      g.pairs_per_row = p.slots_share_x() ? p.extent[2] : 1;
      g.row_scale = pass.operand == Operand::f16 ? scales : nullptr;
      g.b = pass.w;
      g.b_up = p.swiglu ? pass.up : nullptr;
      g.ldb = pass.ldb;
      g.expert_stride = p.n * pass.k_padded;
      g.c = out + row;
      g.ldc = p.n;
      g.scatter = true;
      grouped_gemm(run, g);
    }
  }
}

void run_routed(const CudaRun& run, const Pass& pass) {
  const Product& all = pass.product;
  prepare_rows(run, x_view(all), pass.operand, pass.x, pass.scales, pass.k_padded);
  const int x_per_token = all.slots_share_x() ? 1 : all.extent[2];
  for (int first = 0; first < all.extent[1]; first += pass.tokens_at_once) {
    const Product p = some_tokens(all, first, std::min(pass.tokens_at_once, all.extent[1] - first));
    float* out = p.summed ? pass.pairs : p.out;
    expert_sort(run, ids_view(p), p.n_experts, nullptr, pass.offsets, pass.sorted);
    const int64_t row = int64_t{first} * x_per_token;
    multiply_experts(run, pass, p, static_cast<const uint16_t*>(pass.x) + row * pass.k_padded,
                     pass.scales + row, out);
    fill_unrouted(run, pass.offsets + p.n_experts, pass.sorted, p.n_rows(), out, p.n, p.n);
    if (p.summed) sum_slots(run, p, out);
  }
}

void run_pass(const CudaRun& run, const Pass& pass) {
  if (pass.product.routed) {
    run_routed(run, pass);
  } else {
    run_dense(run, pass);
  }
}

// The halves of a swiglu as products of their own; the second goes to `out`.
Product half(const Product& p, bool second, float* out) {
  Product one = p;
  one.swiglu = false;
  if (second) {
    one.w = p.up;
    one.out = out;
  }
  return one;
}

}  // namespace

bool product_gemm_fits(const Product& p) {
  if (p.w.transposed || p.k == 0) return false;
  if (!p.routed) return true;
  return p.n_experts > 0 && p.n_experts <= kMaxGroupedExperts && p.n_rows() <= kMaxSortedPairs &&
         p.n_slots > 0;
}

size_t product_gemm_scratch_bytes(const Product& p, const DeviceInfo& device) {
  if (!p.swiglu || fused(p)) {
    Room room(nullptr);
    Pass(p, device, room);
    return room.used_bytes();
  }
  Room first(nullptr), second(nullptr);
  Pass(half(p, false, nullptr), device, first);
  second.take<float>(p.n_results() * p.n);
  Pass(half(p, true, nullptr), device, second);
  return std::max(first.used_bytes(), second.used_bytes());
}

void run_product_gemm(const CudaRun& run, const Product& p) {
  Room room(run.scratch);
  if (!p.swiglu || fused(p)) {
    run_pass(run, Pass(p, run.device, room));
    return;
  }
  run_pass(run, Pass(half(p, false, nullptr), run.device, room));
  Room again(run.scratch);  // stream order keeps the passes apart
  float* up = again.take<float>(p.n_results() * p.n);
  run_pass(run, Pass(half(p, true, up), run.device, again));
  multiply_gate(run, p, up);
}

}  // namespace mla::cuda
