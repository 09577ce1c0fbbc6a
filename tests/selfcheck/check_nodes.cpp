// Weights kept in parts, on a pool with made-up nodes, against the same weights in one piece on one
// thread: not a bit may differ.
#include <cstring>
#include <deque>

#include "backends/cpu/cpu_backend.h"
#include "check.h"
#include "sys/topology.h"

namespace selfcheck {
namespace {

using mla::Format;
using mla::Shape;
using mla::Tensor;

constexpr int64_t kWidth = 256;   // D
constexpr int64_t kHidden = 512;  // F
constexpr int64_t kExperts = 5;
constexpr int64_t kUsed = 3;
constexpr int kRuns = 2;

// Weights of one run, whole or in parts.
class Weights {
 public:
  explicit Weights(int n_parts) : n_parts_(n_parts) {}

  Tensor make(Format format, const Shape& shape, unsigned seed) {
    Case c(seed);
    const Floats values = c.normal(shape.n_elems());
    Tensor whole(mla::Layout::contiguous(format, shape), room(shape, format));
    encode(format, values.data(), shape.n_elems(), whole.data);
    return n_parts_ > 1 ? cut(whole) : whole;
  }

 private:
  std::byte* room(const Shape& shape, Format format) {
    memory_.emplace_back(static_cast<size_t>(mla::row_bytes(format, shape.n_elems())));
    return memory_.back().data();
  }

  // By rows of each matrix.
  Tensor cut(const Tensor& whole) {
    const int64_t n_matrices = whole.shape.extent[1];
    const std::vector<int64_t> weights(static_cast<size_t>(n_parts_), 1);
    const auto begins = mla::sys::split_rows_over_nodes(whole.shape.extent[2], weights, 16);
    mla::Slices slices;
    slices.matrix_bytes = whole.stride[1];
    for (size_t i = 0; i + 1 < begins.size(); ++i) {
      const int64_t begin = begins[i] * whole.stride[2];
      const int64_t n_bytes = begins[i + 1] * whole.stride[2] - begin;
      memory_.emplace_back(static_cast<size_t>(n_matrices * n_bytes));
      std::byte* data = memory_.back().data();
      for (int64_t m = 0; m < n_matrices; ++m) {
        std::memcpy(data + m * n_bytes, whole.data + m * whole.stride[1] + begin,
                    static_cast<size_t>(n_bytes));
      }
      slices.parts.push_back({begin, begin + n_bytes, data});
    }
    slices_.push_back(std::move(slices));
    Tensor out(whole, slices_.back().parts.front().data);
    out.slices = &slices_.back();
    return out;
  }

  int n_parts_;
  std::deque<std::vector<std::byte>> memory_;
  std::deque<mla::Slices> slices_;
};

// A dense product, then experts and their weighted sum.
Floats compute(const Machine& machine, Weights& weights, Format format, int64_t n_rows) {
  Case c(7);
  mla::Graph& g = c.graph();
  const auto weight = [&](const char* name, const Shape& shape, unsigned seed) {
    return g.weight(name, weights.make(format, shape, seed));
  };
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n_rows * kUsed; ++i) {
    ids.push_back(static_cast<int32_t>((3 * (i / kUsed) + i % kUsed) % kExperts));
  }
  mla::Node* chosen = c.input(ids, {n_rows, kUsed});
  mla::Node* x = c.input(c.normal(n_rows * kWidth), {n_rows, kWidth});
  mla::Node* shares = c.input(c.normal(n_rows * kUsed), {n_rows, kUsed});
  x = matmul(g, x, weight("dense", {kWidth, kWidth}, 1), {}, x);
  mla::Node* hidden = swiglu_matmul(g, x, weight("gate", {kExperts, kHidden, kWidth}, 2),
                                    weight("up", {kExperts, kHidden, kWidth}, 3), {}, chosen);
  mla::Node* y = matmul_indexed(g, hidden, weight("down", {kExperts, kWidth, kHidden}, 4), chosen,
                                {}, shares, x);
  return c.run(machine, y);
}

Machine make_machine(const std::string& isa, int n_nodes) {
  mla::sys::ThreadPoolOptions options;
  options.n_threads = n_nodes > 1 ? n_nodes + 1 : 1;
  for (int i = 0; i < n_nodes && n_nodes > 1; ++i) {
    options.nodes.push_back({{}, mla::sys::usable_cpus(), 1});
  }
  std::vector<std::shared_ptr<mla::Backend>> backends = {
      std::make_shared<mla::cpu::CpuBackend>(std::make_shared<mla::sys::ThreadPool>(options), isa)};
  return {isa, std::make_shared<mla::Workspace>(std::move(backends))};
}

}  // namespace

void check_nodes(const std::string& isa, Report& report) {
  const Machine one = make_machine(isa, 1);
  for (int n_nodes : {2, 4}) {
    const Machine several = make_machine(isa, n_nodes);
    for (Format format : {Format::F32, Format::Q8_0, Format::Q4_K}) {
      for (int64_t n_rows : {1, 9, 70}) {
        Weights whole(1);
        const Floats expected = compute(one, whole, format, n_rows);
        bool same = true;
        for (int i = 0; i < kRuns && same; ++i) {
          Weights parts(n_nodes);
          same = compute(several, parts, format, n_rows) == expected;
        }
        report.truth(isa,
                     "in parts on " + std::to_string(n_nodes) + " nodes, " +
                         std::string(mla::format_name(format)) + ", " + std::to_string(n_rows) +
                         " rows",
                     same);
      }
    }
  }
}

}  // namespace selfcheck
