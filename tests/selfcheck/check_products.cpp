// Products with weights of every format.
#include "check.h"

namespace selfcheck {
namespace {

using mla::Format;
using mla::Precision;

constexpr int64_t kInner = 512;   // K, two of the largest blocks
constexpr int64_t kColumns = 67;  // N, no multiple of any tile
constexpr int64_t kAcross = 512;  // N where blocks lie along it
constexpr int64_t kExperts = 5;   // E
constexpr int64_t kUsed = 2;      // A

double bound(Precision precision) {
  return precision == Precision::exact ? kExactBound : kFastBound;
}

std::string label(const char* op, Format format, Precision precision, int64_t n_rows) {
  return std::string(op) + " " + std::string(mla::format_name(format)) +
         (precision == Precision::exact ? " exact" : " fast") + ", " + std::to_string(n_rows) +
         " rows";
}

// x [m, k] times w [n, k] (or, across, w [k, n]).
Doubles product(const float* x, const float* w, int64_t m, int64_t n, int64_t k, bool across) {
  Doubles y(static_cast<size_t>(m * n));
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t col = 0; col < n; ++col) {
      double sum = 0;
      for (int64_t i = 0; i < k; ++i) {
        const float weight = across ? w[i * n + col] : w[col * k + i];
        sum += static_cast<double>(x[row * k + i]) * weight;
      }
      y[static_cast<size_t>(row * n + col)] = sum;
    }
  }
  return y;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

struct Variant {
  const Machine& machine;
  Format format;
  Precision precision;
  int64_t n_rows;
};

void check_matmul(const Variant& v, bool across, Report& report) {
  Case c(1);
  const int64_t n = across ? kAcross : kColumns;
  const int64_t k = across ? kColumns : kInner;
  const Floats x = c.normal(v.n_rows * k);
  const Weight w = c.weight(v.format, across ? mla::Shape{k, n} : mla::Shape{n, k});
  mla::Node* y =
      matmul(c.graph(), c.input(x, {v.n_rows, k}), w.node, {v.precision, across}, nullptr);
  const Doubles expected = product(x.data(), w.values.data(), v.n_rows, n, k, across);
  report.error(v.machine,
               label(across ? "matmul across" : "matmul", v.format, v.precision, v.n_rows),
               nmse(c.run(v.machine, y), expected), bound(v.precision));
}

// Experts e, e + 1, .. of row t; weighted sum, plus a residual.
void check_indexed(const Variant& v, Report& report) {
  Case c(2);
  const int64_t t = v.n_rows;
  const Floats x = c.normal(t * kInner);
  const Floats weights = c.normal(t * kUsed);
  const Floats residual = c.normal(t * kColumns);
  const Weight w = c.weight(v.format, {kExperts, kColumns, kInner});
  std::vector<int32_t> ids;
  Doubles expected(residual.begin(), residual.end());
  for (int64_t i = 0; i < t * kUsed; ++i) {
    const int64_t row = i / kUsed;
    const int64_t expert = (3 * row + i % kUsed) % kExperts;
    ids.push_back(static_cast<int32_t>(expert));
    const Doubles y = product(x.data() + row * kInner, w.values.data() + expert * kColumns * kInner,
                              1, kColumns, kInner, false);
    for (int64_t col = 0; col < kColumns; ++col) {
      expected[static_cast<size_t>(row * kColumns + col)] +=
          static_cast<double>(weights[static_cast<size_t>(i)]) * y[static_cast<size_t>(col)];
    }
  }
  mla::Node* y = matmul_indexed(c.graph(), c.input(x, {t, 1, kInner}), w.node,
                                c.input(ids, {t, kUsed}), {v.precision, false},
                                c.input(weights, {t, kUsed}), c.input(residual, {t, kColumns}));
  report.error(v.machine, label("matmul_indexed", v.format, v.precision, t),
               nmse(c.run(v.machine, y), expected), bound(v.precision));
}

void check_swiglu_matmul(const Variant& v, Report& report) {
  Case c(3);
  const Floats x = c.normal(v.n_rows * kInner);
  // Small products: silu then bends where they lie.
  const Weight gate = c.weight(v.format, {kColumns, kInner}, 0.05f);
  const Weight up = c.weight(v.format, {kColumns, kInner}, 0.05f);
  Doubles expected = product(x.data(), gate.values.data(), v.n_rows, kColumns, kInner, false);
  const Doubles ups = product(x.data(), up.values.data(), v.n_rows, kColumns, kInner, false);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] = silu(expected[i]) * ups[i];
  mla::Node* y = swiglu_matmul(c.graph(), c.input(x, {v.n_rows, kInner}), gate.node, up.node,
                               {v.precision, false});
  report.error(v.machine, label("swiglu_matmul", v.format, v.precision, v.n_rows),
               nmse(c.run(v.machine, y), expected), bound(v.precision));
}

void check_get_rows(const Machine& machine, Format format, Report& report) {
  Case c(4);
  const Weight table = c.weight(format, {9, kInner});
  const std::vector<int32_t> ids = {8, 0, 3, 3, 5};
  Doubles expected;
  for (int32_t id : ids) {
    const float* row = table.values.data() + id * kInner;
    expected.insert(expected.end(), row, row + kInner);
  }
  mla::Node* y = get_rows(c.graph(), table.node, c.input(ids, {5}));
  report.error(machine, label("get_rows", format, Precision::exact, 5),
               nmse(c.run(machine, y), expected), 0);
}

}  // namespace

void check_products(const Machine& machine, Report& report) {
  for (int f = 0; f < mla::kFormatCount; ++f) {
    const auto format = static_cast<Format>(f);
    if (format == Format::I32) continue;
    check_get_rows(machine, format, report);
    for (Precision precision : {Precision::exact, Precision::fast}) {
      for (int64_t n_rows : {1, 3, 19, 40}) {
        const Variant v = {machine, format, precision, n_rows};
        check_matmul(v, false, report);
        check_indexed(v, report);
        check_swiglu_matmul(v, report);
      }
      check_matmul({machine, format, precision, 3}, true, report);
    }
  }
}

}  // namespace selfcheck
