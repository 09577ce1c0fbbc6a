// Ops on rows: norms, rotations, softmax, gates, conversions, routing.
#include <algorithm>
#include <numeric>

#include "check.h"

namespace selfcheck {
namespace {

using mla::Format;

constexpr int64_t kRows = 5;
constexpr int64_t kWidths[] = {2, 16, 66, 258};  // with and without tails in any vector

void check_rms_norm(const Machine& machine, int64_t n, Report& report) {
  Case c(10);
  const float eps = 1e-6f;
  const Floats x = c.normal(kRows * n, 3);
  const Floats weight = c.normal(n);
  Doubles expected;
  for (int64_t row = 0; row < kRows; ++row) {
    const float* r = x.data() + row * n;
    double power = 0;
    for (int64_t i = 0; i < n; ++i) power += static_cast<double>(r[i]) * r[i];
    const double factor = 1 / std::sqrt(power / static_cast<double>(n) + eps);
    for (int64_t i = 0; i < n; ++i) {
      expected.push_back(r[i] * factor * weight[static_cast<size_t>(i)]);
    }
  }
  mla::Node* y = rms_norm(c.graph(), c.input(x, {kRows, n}), c.input(weight, {n}), {eps});
  report.error(machine, "rms_norm, width " + std::to_string(n), nmse(c.run(machine, y), expected),
               kExactBound);
}

void check_rope(const Machine& machine, int64_t n, Report& report) {
  Case c(11);
  const float scale = 1.25f;
  const Floats x = c.normal(kRows * n);
  const std::vector<int32_t> positions = {0, 1, 77, 4095, 163839};
  Floats frequencies;
  for (int64_t i = 0; i < n / 2; ++i) {
    frequencies.push_back(
        std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(n)));
  }
  Doubles expected(x.size());
  for (size_t i = 0; i < x.size(); i += 2) {
    const size_t row = i / static_cast<size_t>(n);
    const double angle =
        static_cast<double>(positions[row]) * frequencies[(i % static_cast<size_t>(n)) / 2];
    expected[i] = scale * (x[i] * std::cos(angle) - x[i + 1] * std::sin(angle));
    expected[i + 1] = scale * (x[i] * std::sin(angle) + x[i + 1] * std::cos(angle));
  }
  mla::Node* y = rope(c.graph(), c.input(x, {kRows, n}), c.input(positions, {kRows}),
                      c.input(frequencies, {n / 2}), {scale});
  report.error(machine, "rope, width " + std::to_string(n), nmse(c.run(machine, y), expected),
               kExactBound);
}

void check_softmax(const Machine& machine, int64_t n, Report& report) {
  Case c(12);
  const float scale = 0.7f;
  const Floats x = c.normal(kRows * n, 20);
  Floats mask(x.size(), 0.0f);
  for (size_t i = 1; i < mask.size(); i += 3) mask[i] = -INFINITY;
  Doubles expected;
  for (size_t row = 0; row < static_cast<size_t>(kRows); ++row) {
    const size_t first = row * static_cast<size_t>(n);
    double sum = 0;
    Doubles terms;
    for (size_t i = first; i < first + static_cast<size_t>(n); ++i) {
      terms.push_back(std::exp(static_cast<double>(scale) * x[i] + mask[i]));
      sum += terms.back();
    }
    for (double term : terms) expected.push_back(term / sum);
  }
  mla::Node* y = softmax(c.graph(), c.input(x, {kRows, n}), c.input(mask, {kRows, n}), {scale});
  report.error(machine, "softmax, width " + std::to_string(n), nmse(c.run(machine, y), expected),
               kExactBound);
}

void check_swiglu_and_add(const Machine& machine, int64_t n, Report& report) {
  Case c(13);
  const Floats gate = c.normal(kRows * n, 4);
  const Floats up = c.normal(kRows * n);
  Doubles expected;
  for (size_t i = 0; i < gate.size(); ++i) {
    expected.push_back(gate[i] / (1 + std::exp(-static_cast<double>(gate[i]))) * up[i] + gate[i]);
  }
  mla::Node* g = c.input(gate, {kRows, n});
  mla::Node* y = add(c.graph(), swiglu(c.graph(), g, c.input(up, {kRows, n})), g);
  report.error(machine, "swiglu + add, width " + std::to_string(n),
               nmse(c.run(machine, y), expected), kExactBound);
}

void check_copy(const Machine& machine, Format format, Report& report) {
  Case c(14);
  constexpr int64_t n = 66;
  const Floats x = c.normal(kRows * n);
  // Transposed on the way, so that elements are strided.
  Floats turned;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t row = 0; row < kRows; ++row) {
      turned.push_back(x[static_cast<size_t>(row * n + i)]);
    }
  }
  std::vector<std::byte> bytes(static_cast<size_t>(mla::row_bytes(format, kRows * n)));
  encode(format, turned.data(), kRows * n, bytes.data());
  mla::decode(format, bytes.data(), kRows * n, turned.data());
  const int axes[] = {1, 0};
  mla::Node* y = copy(c.graph(), view_permute(c.graph(), c.input(x, {kRows, n}), axes), format);
  report.error(machine, "copy of a transposed view to " + std::string(mla::format_name(format)),
               nmse(c.run(machine, y), Doubles(turned.begin(), turned.end())), 0);
}

void check_square_sums(const Machine& machine, int64_t n, Report& report) {
  Case c(16);
  constexpr int64_t n_experts = 3;
  const Floats x = c.normal(kRows * n);
  const std::vector<int32_t> ids = {2, 0, 2, 2, 0};
  Doubles expected(static_cast<size_t>(n_experts * n));
  for (size_t row = 0; row < ids.size(); ++row) {
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      const double value = x[row * static_cast<size_t>(n) + i];
      expected[static_cast<size_t>(ids[row]) * static_cast<size_t>(n) + i] += value * value;
    }
  }
  const mla::SquareSums state = {c.state(Format::F32, {n_experts, n}),
                                 c.state(Format::I32, {n_experts})};
  mla::Node* sums =
      square_sums(c.graph(), state, c.input(x, {kRows, 1, n}), c.input(ids, {kRows, 1})).sums;
  report.error(machine, "square_sums, width " + std::to_string(n),
               nmse(c.run(machine, sums), expected), kExactBound);
}

// Greedy choice among all, softmax scores, normalized.
void check_route(const Machine& machine, Report& report) {
  Case c(15);
  constexpr int64_t n = 24;
  constexpr int n_used = 4;
  const Floats logits = c.normal(kRows * n);
  Doubles expected;
  for (int64_t row = 0; row < kRows; ++row) {
    std::vector<double> scores(logits.begin() + row * n, logits.begin() + (row + 1) * n);
    for (double& score : scores) score = std::exp(score);
    std::sort(scores.rbegin(), scores.rend());
    const double sum = std::accumulate(scores.begin(), scores.begin() + n_used, 0.0);
    for (int i = 0; i < n_used; ++i) expected.push_back(scores[static_cast<size_t>(i)] / sum);
  }
  mla::RouteAttrs attrs;
  attrs.n_used = n_used;
  attrs.normalize = true;
  mla::Node* y = route(c.graph(), c.input(logits, {kRows, n}), nullptr, attrs).weights;
  report.error(machine, "route", nmse(c.run(machine, copy(c.graph(), y, Format::F32)), expected),
               kExactBound);
}

void check_top_k(const Machine& machine, Report& report) {
  Case c(17);
  constexpr int64_t n = 301;
  constexpr int k = 20;
  const Floats x = c.normal(kRows * n);
  Doubles expected;
  for (int64_t row = 0; row < kRows; ++row) {
    std::vector<double> sorted(x.begin() + row * n, x.begin() + (row + 1) * n);
    std::sort(sorted.rbegin(), sorted.rend());
    expected.insert(expected.end(), sorted.begin(), sorted.begin() + k);
  }
  mla::Node* y = top_k(c.graph(), c.input(x, {kRows, n}), {k}).values;
  report.error(machine, "top_k", nmse(c.run(machine, copy(c.graph(), y, Format::F32)), expected),
               0);
}

}  // namespace

void check_rows(const Machine& machine, Report& report) {
  for (int64_t n : kWidths) {
    check_rms_norm(machine, n, report);
    check_rope(machine, n, report);
    check_softmax(machine, n, report);
    check_swiglu_and_add(machine, n, report);
    check_square_sums(machine, n, report);
  }
  for (Format format : {Format::F32, Format::F16, Format::BF16}) {
    check_copy(machine, format, report);
  }
  check_route(machine, report);
  check_top_k(machine, report);
}

}  // namespace selfcheck
