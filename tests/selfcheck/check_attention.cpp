// Attention over a cache of latents, in the latent and expanded, for every cache type.
#include "check.h"

namespace selfcheck {
namespace {

using mla::Format;
using mla::Precision;

// H heads, N/R/V head dims, C latent, T new tokens, S cells attended by the last of them.
constexpr int64_t kH = 3, kN = 32, kR = 16, kV = 32, kC = 64, kT = 11, kS = 75;
constexpr int kBlockCells = 16;
constexpr int64_t kBlocks = 6;

struct Setting {
  Format latent;
  Format rope;
  bool expanded;
  Precision precision;
};

// What the cells of a plane hold, [S, width], in the order of the sequence.
Floats stored(const mla::Node& plane, const std::vector<int32_t>& cells) {
  const int64_t width = plane.dim(-1);
  const int64_t row_bytes = mla::row_bytes(plane.format(), width);
  Floats values(cells.size() * static_cast<size_t>(width));
  for (size_t i = 0; i < cells.size(); ++i) {
    mla::decode(plane.format(), plane.constant + cells[i] * row_bytes, width,
                values.data() + i * static_cast<size_t>(width));
  }
  return values;
}

struct Operands {
  Floats q_nope, q_rope;  // [T, H, N], [T, H, R]
  Floats latent, rope;    // [S, C], [S, R], as the cache holds them
  Floats k_b, v_b;        // [H, C, N], [H, V, C]
  float scale;
};

// One row of the result, [V]: token t, head h, with queries and values in the latent.
void attend(const Operands& o, int64_t t, int64_t h, double* out) {
  Doubles query(kC);
  for (int64_t c = 0; c < kC; ++c) {
    for (int64_t n = 0; n < kN; ++n) {
      query[c] +=
          static_cast<double>(o.k_b[(h * kC + c) * kN + n]) * o.q_nope[(t * kH + h) * kN + n];
    }
  }
  const int64_t n_visible = kS - kT + 1 + t;
  Doubles value(kC);
  double sum = 0;
  for (int64_t s = 0; s < n_visible; ++s) {
    double score = 0;
    for (int64_t c = 0; c < kC; ++c) score += query[c] * o.latent[s * kC + c];
    for (int64_t r = 0; r < kR; ++r) {
      score += static_cast<double>(o.q_rope[(t * kH + h) * kR + r]) * o.rope[s * kR + r];
    }
    const double weight = std::exp(o.scale * score);  // scores are small here: no maximum needed
    sum += weight;
    for (int64_t c = 0; c < kC; ++c) value[c] += weight * o.latent[s * kC + c];
  }
  for (int64_t v = 0; v < kV; ++v) {
    out[v] = 0;
    for (int64_t c = 0; c < kC; ++c) out[v] += o.v_b[(h * kV + v) * kC + c] * value[c] / sum;
  }
}

// Cells of the sequence, in blocks that lie in the cache in reverse order.
std::vector<int32_t> block_table() {
  std::vector<int32_t> blocks;
  for (int64_t i = 0; i < kBlocks; ++i) blocks.push_back(static_cast<int32_t>(kBlocks - 1 - i));
  return blocks;
}

void check_setting(const Machine& machine, const Setting& s, const std::string& name,
                   Report& report) {
  Case c(20);
  Operands o;
  o.scale = 0.1f;
  o.q_nope = c.normal(kT * kH * kN);
  o.q_rope = c.normal(kT * kH * kR);
  const Floats latent = c.normal(kS * kC);
  const Floats rope = c.normal(kS * kR);
  const Weight k_b = c.weight(Format::F16, {kH, kC, kN}, 0.1f);
  const Weight v_b = c.weight(Format::F16, {kH, kV, kC}, 0.1f);
  o.k_b = k_b.values;
  o.v_b = v_b.values;
  std::vector<int32_t> cells;
  for (int64_t i = 0; i < kS; ++i) {
    cells.push_back(block_table()[i / kBlockCells] * kBlockCells + i % kBlockCells);
  }
  mla::Graph& g = c.graph();
  const mla::CacheNodes empty = {c.state(s.latent, {kBlocks * kBlockCells, kC}),
                                 c.state(s.rope, {kBlocks * kBlockCells, kR})};
  const mla::CacheNodes cache = cache_write(g, empty, c.input(latent, {kS, kC}),
                                            c.input(rope, {kS, kR}), c.input(cells, {kS}));
  const std::vector<int32_t> span = {0, 0, kT, 0, kS, s.expanded};
  const mla::AttentionAttrs attrs = {
      .precision = s.precision, .scale = o.scale, .block_cells = kBlockCells};
  mla::Node* y = mla_attention(g, c.input(o.q_nope, {kT, kH, kN}), c.input(o.q_rope, {kT, kH, kR}),
                               cache, k_b.node, v_b.node, c.input(span, {1, 6}),
                               c.input(block_table(), {1, kBlocks}), attrs);
  const Floats got = c.run(machine, y);
  o.latent = stored(*empty.latent, cells);
  o.rope = stored(*empty.rope, cells);
  Doubles expected(kT * kH * kV);
  for (int64_t i = 0; i < kT * kH; ++i) attend(o, i / kH, i % kH, expected.data() + i * kV);
  report.error(machine, name + ": cells", nmse(o.latent, Doubles(latent.begin(), latent.end())),
               kFastBound);
  report.error(machine, name, nmse(got, expected),
               s.precision == Precision::exact ? kExactBound : kFastBound);
}

}  // namespace

void check_attention(const Machine& machine, Report& report) {
  constexpr Format kTypes[][2] = {{Format::F32, Format::F32},
                                  {Format::F16, Format::F16},
                                  {Format::BF16, Format::BF16},
                                  {Format::Q8_0, Format::F16}};
  for (const auto& type : kTypes) {
    for (bool expanded : {false, true}) {
      for (Precision precision : {Precision::exact, Precision::fast}) {
        const std::string name = std::string("mla_attention ") +
                                 (expanded ? "expanded" : "absorbed") + ", cache " +
                                 std::string(mla::format_name(type[0])) +
                                 (precision == Precision::exact ? " exact" : " fast");
        check_setting(machine, {type[0], type[1], expanded, precision}, name, report);
      }
    }
  }
}

}  // namespace selfcheck
