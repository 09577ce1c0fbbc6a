// Products of gemm.h and the order of experts against float64, on a device or emulated.
// Exit status 0: all good. An argument limits the run to cases whose name contains it.
#include <algorithm>

#include "backends/cuda/gemm_plan.h"
#include "backends/cuda/gemm_wgmma.h"
#include "gemm_cases.h"

namespace mla::cuda::test {
namespace {

// ---- dense --------------------------------------------------------------------------------------

struct DenseCase {
  int m, n, k;
  Operand operand = Operand::f16;
  Result result = Result::f32;
  int n_batch = 1;
  int m_limit = -1;
  bool fused = false, scaled = true, residual = false, odd_stride = false, shared_b = false;

  std::string name() const {
    return "dense " + std::to_string(n_batch) + " x " + std::to_string(m) + " x " +
           std::to_string(n) + " x " + std::to_string(k) +
           (operand == Operand::bf16 ? " bf16" : "") + (result == Result::f16 ? " to f16" : "") +
           (fused ? " fused" : "") + (residual ? " + residual" : "") +
           (m_limit >= 0 ? " limited" : "") + (odd_stride ? " odd stride" : "") +
           (shared_b ? " shared b" : "");
  }
};

void dense(Context& t, const DenseCase& c) {
  if (!t.wants(c.name())) return;
  std::mt19937 rng(1);
  const int64_t lda = pad_k(c.k) + 8, ldb = pad_k(c.k), ldc = c.n + (c.odd_stride ? 1 : 4);
  const int64_t rows = int64_t{c.n_batch} * c.m, b_rows = int64_t{c.shared_b ? 1 : c.n_batch} * c.n;
  const Numbers a = random_rows(rng, rows, c.k, lda, c.operand);
  const Numbers b = random_rows(rng, b_rows, c.k, ldb, c.operand);
  const Numbers up = random_rows(rng, b_rows, c.k, ldb, c.operand);
  const std::vector<float> scale = random_floats(rng, static_cast<size_t>(rows));
  const std::vector<float> residual = random_floats(rng, static_cast<size_t>(rows * ldc));
  const Device<uint16_t> da(a.bits, t.stream), db(b.bits, t.stream), dup(up.bits, t.stream);
  const Device<float> dscale(scale, t.stream), dresidual(residual, t.stream);
  const std::vector<int> limit = {c.m_limit};
  const Device<int> dlimit(limit, t.stream);
  const std::vector<float> before(static_cast<size_t>(rows * ldc), 7.5f);
  const Device<float> dc(before, t.stream);

  Gemm g;
  g.operand = c.operand, g.result = c.result, g.m = c.m, g.n = c.n, g.k = c.k;
  g.a = da.get(), g.b = db.get(), g.b_up = c.fused ? dup.get() : nullptr, g.c = dc.get();
  g.lda = lda, g.ldb = ldb, g.ldc = ldc, g.ld_residual = ldc;
  g.row_scale = c.scaled ? dscale.get() : nullptr;
  g.residual = c.residual ? dresidual.get() : nullptr;
  g.m_limit = c.m_limit >= 0 ? dlimit.get() : nullptr;
  g.n_batch = c.n_batch, g.batch_a = c.m * lda, g.batch_b = c.shared_b ? 0 : c.n * ldb;
  g.batch_c = g.batch_residual = c.m * ldc, g.batch_scale = c.m;
  g.scratch_bytes = gemm_scratch_bytes(g, t.device);
  const Device<std::byte> scratch(g.scratch_bytes);
  g.scratch = scratch.get();
  gemm(t.run(), g);

  const std::vector<float> out = dc.host(t.stream);
  const auto* halves = reinterpret_cast<const uint16_t*>(out.data());
  Worst worst;
  for (int64_t r = 0; r < rows; ++r) {
    const double s = c.scaled ? scale[static_cast<size_t>(r)] : 1.0;
    for (int64_t n = 0; n < c.n; ++n) {
      const auto at = static_cast<size_t>(r * ldc + n);
      const double got = c.result == Result::f16 ? half_to_float(halves[at]) : out[at];
      if (c.m_limit >= 0 && r % c.m >= c.m_limit) {
        if (c.result == Result::f32) worst.add(got, 7.5, 1e-30, r * c.n + n);
        continue;
      }
      const int64_t b_row = (c.shared_b ? 0 : r / c.m * c.n) + n;
      const Dot d = dot(a.values.data() + r * lda, b.values.data() + b_row * ldb, c.k);
      double expected = s * d.sum, bound = std::abs(s) * d.magnitude * 2e-6 + 1e-7;
      if (c.fused) {
        const Dot u = dot(a.values.data() + r * lda, up.values.data() + b_row * ldb, c.k);
        expected = silu(s * d.sum) * s * u.sum;
        bound = 1.2 * (bound * std::abs(s * u.sum) +
                       (std::abs(s) * u.magnitude * 2e-6) * std::abs(s * d.sum)) +
                1e-6 * std::abs(expected) + 1e-7;
      }
      if (c.residual) expected += residual[at];
      if (c.result == Result::f16) bound += std::abs(expected) / 2000 + 1e-7;
      worst.add(got, expected, bound, r * c.n + n);
    }
  }
  t.report(worst, c.name() + ": " + plan_gemm(g, t.device, has_wgmma(t.device)).str());
}

// ---- grouped ------------------------------------------------------------------------------------

struct GroupedCase {
  int tokens, per_token, experts, n, k;
  Operand operand = Operand::f16;
  bool sorted_a = false, scatter = true, fused = false, in_chunks = false, stray_ids = false;

  std::string name() const {
    return "grouped " + std::to_string(tokens) + " x " + std::to_string(per_token) + " of " +
           std::to_string(experts) + " x " + std::to_string(n) + " x " + std::to_string(k) +
           (operand == Operand::bf16 ? " bf16" : "") + (sorted_a ? " sorted" : " gathered") +
           (scatter ? " scattered" : "") + (fused ? " fused" : "") + (in_chunks ? " chunks" : "") +
           (stray_ids ? " stray" : "");
  }
};

struct Sorted {
  std::vector<int> ids, offsets, pairs;
};

// The host's own order, which the device's must equal.
Sorted sort_on_host(std::mt19937& rng, const GroupedCase& c) {
  Sorted s;
  const int n_pairs = c.tokens * c.per_token;
  for (int p = 0; p < n_pairs; ++p) {
    const int skewed =
        static_cast<int>(std::min(rng() % unsigned(c.experts), rng() % unsigned(c.experts)));
    s.ids.push_back(c.stray_ids && rng() % 5 == 0 ? (rng() % 2 == 0 ? -1 : c.experts) : skewed);
  }
  for (int e = 0; e <= c.experts; ++e) {
    s.offsets.push_back(static_cast<int>(s.pairs.size()));
    for (int p = 0; p < n_pairs; ++p) {
      const int id = s.ids[size_t(p)];
      const bool stray = id < 0 || id >= c.experts;
      if (e == c.experts ? stray : id == e) s.pairs.push_back(p);
    }
  }
  return s;
}

void grouped(Context& t, const GroupedCase& c) {
  if (!t.wants(c.name())) return;
  std::mt19937 rng(2);
  const Sorted sorted = sort_on_host(rng, c);
  const int n_pairs = c.tokens * c.per_token;
  const Device<int> ids(sorted.ids, t.stream), counts(size_t(c.experts)),
      offsets(size_t(c.experts) + 1), pairs(size_t(n_pairs) + 1);
  View view;
  view.data = reinterpret_cast<std::byte*>(ids.get());
  view.format = Format::I32;
  view.extent[2] = c.tokens, view.extent[3] = c.per_token;
  view.stride[2] = 4 * c.per_token, view.stride[3] = 4;
  expert_sort(t.run(), view, c.experts, counts.get(), offsets.get(), pairs.get());
  std::vector<int> order = pairs.host(t.stream);
  order.resize(size_t(n_pairs));
  Worst sort;
  sort.add(order == sorted.pairs && offsets.host(t.stream) == sorted.offsets ? 0 : 1, 0, 0.5, 0);
  t.report(sort, c.name() + ": sort");

  const int64_t lda = pad_k(c.k), ldb = pad_k(c.k), ldc = c.n;
  const int a_rows = c.sorted_a ? n_pairs : c.tokens;
  const Numbers a = random_rows(rng, a_rows, c.k, lda, c.operand);
  const Numbers b = random_rows(rng, int64_t{c.experts} * c.n, c.k, ldb, c.operand);
  const Numbers up = random_rows(rng, int64_t{c.experts} * c.n, c.k, ldb, c.operand);
  const std::vector<float> scale = random_floats(rng, size_t(a_rows));
  const Device<uint16_t> da(a.bits, t.stream), db(b.bits, t.stream), dup(up.bits, t.stream);
  const Device<float> dscale(scale, t.stream);
  const Device<float> dc(std::vector<float>(size_t(n_pairs * ldc), 7.5f), t.stream);

  GroupedGemm g;
  g.operand = c.operand, g.n_rows = n_pairs, g.n = c.n, g.k = c.k;
  g.n_model_experts = c.experts, g.offsets = offsets.get(), g.sorted_pairs = pairs.get();
  g.a = da.get(), g.lda = lda, g.pairs_per_row = c.sorted_a ? 0 : c.per_token;
  g.row_scale = dscale.get(), g.ldb = ldb, g.expert_stride = c.n * ldb;
  g.c = dc.get(), g.ldc = ldc, g.scatter = c.scatter;
  const int step = c.in_chunks ? (c.experts + 2) / 3 : c.experts;
  for (int e = 0; e < c.experts; e += step) {
    g.first_expert = e, g.n_experts = std::min(step, c.experts - e);
    g.b = db.get() + e * g.expert_stride;
    g.b_up = c.fused ? dup.get() + e * g.expert_stride : nullptr;
    grouped_gemm(t.run(), g);
  }
  if (c.scatter) {
    fill_unrouted(t.run(), offsets.get() + c.experts, pairs.get(), n_pairs, dc.get(), ldc, c.n);
  }

  const std::vector<float> out = dc.host(t.stream);
  Worst worst;
  for (int i = 0; i < n_pairs; ++i) {
    const int pair = sorted.pairs[size_t(i)], id = sorted.ids[size_t(pair)];
    const bool stray = id < 0 || id >= c.experts;
    const int64_t a_row = c.sorted_a ? i : pair / c.per_token;
    const double s = scale[size_t(a_row)];
    for (int n = 0; n < c.n; ++n) {
      const double got = out[size_t((c.scatter ? pair : i) * ldc + n)];
      if (stray) {
        worst.add(got, c.scatter ? double(NAN) : 7.5, 1e-30, i);
        continue;
      }
      const size_t b_row = size_t((int64_t{id} * c.n + n) * ldb);
      const Dot d = dot(a.values.data() + a_row * lda, b.values.data() + b_row, c.k);
      double expected = s * d.sum, bound = std::abs(s) * d.magnitude * 2e-6 + 1e-7;
      if (c.fused) {
        const Dot u = dot(a.values.data() + a_row * lda, up.values.data() + b_row, c.k);
        expected = silu(s * d.sum) * s * u.sum;
        bound = 1.2 * (bound * std::abs(s * u.sum) +
                       (std::abs(s) * u.magnitude * 2e-6) * std::abs(s * d.sum)) +
                1e-6 * std::abs(expected) + 1e-7;
      }
      worst.add(got, expected, bound, int64_t{i} * c.n + n);
    }
  }
  g.first_expert = 0, g.n_experts = step;
  t.report(worst, c.name() + ": " + plan_grouped_gemm(g, t.device, has_wgmma(t.device)).str());
}

void products(Context& t) {
  constexpr Operand bf16 = Operand::bf16;
  constexpr Result f16 = Result::f16;
  for (const DenseCase& c : std::initializer_list<DenseCase>{
           {.m = 1, .n = 1, .k = 1},
           {.m = 70, .n = 130, .k = 40},
           {.m = 126, .n = 251, .k = 100},
           {.m = 61, .n = 250, .k = 136, .residual = true},
           {.m = 64, .n = 100, .k = 300, .fused = true},
           {.m = 250, .n = 120, .k = 72, .operand = bf16, .residual = true},
           {.m = 130, .n = 257, .k = 72, .residual = true},
           {.m = 65, .n = 66, .k = 100, .operand = bf16, .residual = true, .odd_stride = true},
           {.m = 33, .n = 70, .k = 96, .result = f16, .n_batch = 3},
           {.m = 40, .n = 24, .k = 64, .n_batch = 2, .residual = true, .shared_b = true},
           {.m = 100, .n = 90, .k = 128, .m_limit = 70},
           {.m = 120, .n = 120, .k = 64, .n_batch = 2, .m_limit = 0},
           {.m = 100, .n = 75, .k = 64, .fused = true, .odd_stride = true},
           {.m = 120, .n = 127, .k = 200, .result = f16, .fused = true},
           {.m = 20, .n = 30, .k = 1100, .residual = true},
           {.m = 5, .n = 6, .k = 0, .scaled = false, .residual = true}}) {
    dense(t, c);
  }
  for (const GroupedCase& c : std::initializer_list<GroupedCase>{
           {.tokens = 40, .per_token = 3, .experts = 7, .n = 70, .k = 64},
           {.tokens = 150, .per_token = 3, .experts = 2, .n = 120, .k = 104},
           {.tokens = 40, .per_token = 3, .experts = 7, .n = 200, .k = 168},
           {.tokens = 30, .per_token = 4, .experts = 7, .n = 110, .k = 328, .fused = true},
           {.tokens = 90, .per_token = 4, .experts = 5, .n = 40, .k = 72, .stray_ids = true},
           {.tokens = 60,
           .per_token = 2,
           .experts = 9,
           .n = 36,
           .k = 64,
           .sorted_a = true,
           .in_chunks = true},
           {.tokens = 50,
           .per_token = 3,
           .experts = 300,
           .n = 34,
           .k = 32,
           .scatter = false,
           .fused = true,
           .stray_ids = true},
           {.tokens = 30, .per_token = 2, .experts = 512, .n = 10, .k = 16, .operand = bf16}}) {
    grouped(t, c);
  }
}

void all(Context& t) {
  // Few multiprocessors: large tiles, several per block. Capability 8.0: the way of older devices.
  for (const int major : {t.device.major, 8}) {
    for (const int n_sm : {1, t.device.n_sm}) {
      Context with = t;
      with.device.major = major, with.device.n_sm = n_sm;
      products(with);
      t.good = t.good && with.good;
    }
    if (!has_wgmma(t.device)) break;
  }
}

}  // namespace
}  // namespace mla::cuda::test

int main(int argc, char** argv) {
  return mla::cuda::test::run_all(mla::cuda::test::all, argc > 1 ? argv[1] : "");
}
