// Small graphs on random numbers, computed by the backend and, in float64, by the checks.
#pragma once

#include <cmath>
#include <cstdio>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backends/cpu/isa.h"
#include "backends/cpu/recode.h"
#include "exec/executor.h"
#include "graph/ops.h"
#include "quant/decode.h"

namespace selfcheck {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline constexpr double kExactBound = 1e-10;  // normalized mean squared error against float64
inline constexpr double kFastBound = 5e-4;

// One ISA, and the memory its graphs run in.
struct Machine {
  std::string isa;
  std::shared_ptr<mla::Workspace> workspace;
};

// Counts what failed; prints one line per check.
class Report {
 public:
  void error(const Machine& machine, const std::string& name, double nmse, double bound) {
    const bool good = nmse <= bound;  // false for NaN
    std::printf("%-4s %-10s %-44s %.2e <= %.0e\n", good ? "ok" : "FAIL", machine.isa.c_str(),
                name.c_str(), nmse, bound);
    count(good);
  }
  void truth(const std::string& isa, const std::string& name, bool good) {
    std::printf("%-4s %-10s %s\n", good ? "ok" : "FAIL", isa.c_str(), name.c_str());
    count(good);
  }
  int n_checks() const { return n_checks_; }
  int n_failed() const { return n_failed_; }

 private:
  void count(bool good) {
    ++n_checks_;
    n_failed_ += good ? 0 : 1;
  }
  int n_checks_ = 0;
  int n_failed_ = 0;
};

inline double nmse(const Floats& got, const Doubles& expected) {
  if (got.size() != expected.size()) return NAN;
  double error = 0;
  double power = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double off = got[i] - expected[i];
    error += off * off;
    power += expected[i] * expected[i];
  }
  return power > 0 ? error / power : error;
}

// The best ISA encodes: all give the same bytes.
inline void encode(mla::Format format, const float* x, int64_t n, std::byte* out) {
  mla::cpu::encode(mla::cpu::select_isa(""), format, {x, n, nullptr, n, 0, out});
}

// A weight of some format, and the numbers it stands for.
struct Weight {
  mla::Node* node;
  Floats values;
};

// A graph being built, with the data its leaves hold.
class Case {
 public:
  explicit Case(unsigned seed) : random_(seed) {}
  mla::Graph& graph() { return *graph_; }

  Floats normal(int64_t n, float scale = 1) {
    std::normal_distribution<float> distribution(0, scale);
    Floats values(static_cast<size_t>(n));
    for (float& value : values) value = distribution(random_);
    return values;
  }

  mla::Node* input(const Floats& values, const mla::Shape& shape) {
    floats_.push_back(values);
    return add(mla::Format::F32, shape, floats_.back().data());
  }
  mla::Node* input(const std::vector<int32_t>& values, const mla::Shape& shape) {
    ints_.push_back(values);
    return add(mla::Format::I32, shape, ints_.back().data());
  }

  // Random numbers of deviation `scale`, encoded.
  Weight weight(mla::Format format, const mla::Shape& shape, float scale = 1) {
    const int64_t n = shape.n_elems();
    Floats values = normal(n, scale);
    std::byte* data = allocate(mla::row_bytes(format, n));
    encode(format, values.data(), n, data);
    mla::decode(format, data, n, values.data());
    const mla::Tensor tensor(mla::Layout::contiguous(format, shape), data);
    return {graph_->weight(next_name(), tensor), std::move(values)};
  }

  // Memory that outlives the run, zeros at first.
  mla::Node* state(mla::Format format, const mla::Shape& shape) {
    std::byte* data = allocate(mla::row_bytes(format, shape.n_elems()));
    return graph_->state(next_name(), mla::Tensor(mla::Layout::contiguous(format, shape), data));
  }

  Floats run(const Machine& machine, mla::Node* result) {
    graph_->output(result);
    mla::Executor executor(graph_, machine.workspace);
    executor.run(inputs_, [] {});
    const mla::Tensor out = executor.output(0);
    Floats values(static_cast<size_t>(out.shape.n_elems()));
    mla::decode(out.format, out.data, out.shape.n_elems(), values.data());
    return values;
  }

 private:
  std::string next_name() { return "leaf" + std::to_string(names_.size() + n_constants_++); }
  std::byte* allocate(int64_t n_bytes) {
    blocks_.emplace_back(static_cast<size_t>(n_bytes));
    return blocks_.back().data();
  }
  mla::Node* add(mla::Format format, const mla::Shape& shape, const void* data) {
    names_.push_back("input" + std::to_string(names_.size()));
    inputs_.push_back({names_.back(), format, shape, data});
    return graph_->input(names_.back(), format, shape);
  }

  std::mt19937 random_;
  std::shared_ptr<mla::Graph> graph_ = std::make_shared<mla::Graph>();
  std::deque<Floats> floats_;
  std::deque<std::vector<int32_t>> ints_;
  std::deque<std::vector<std::byte>> blocks_;
  std::deque<std::string> names_;
  std::vector<mla::InputData> inputs_;
  size_t n_constants_ = 0;
};

void check_products(const Machine& machine, Report& report);
void check_rows(const Machine& machine, Report& report);
void check_attention(const Machine& machine, Report& report);
void check_pool(Report& report);
void check_nodes(const std::string& isa, Report& report);

}  // namespace selfcheck
