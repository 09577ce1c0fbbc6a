// Operands for expanded attention and what comes out of them in float64: for its test and its
// bench.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backends/cuda/attention_expanded.h"
#include "graph/graph.h"
#include "graph/ops.h"

namespace mla::cuda::test {

struct Length {
  int n_tokens, n_cells;
  bool expanded = true;
};

struct Case {
  std::string name;
  int h, n, r, c, v;
  std::vector<Length> spans;
  Format latent = Format::F16, rope = Format::F16;
  size_t max_cell_bytes = kExpandedBytes;
  bool k_b_transposed = false;
  float scale = 0.1f;
};

inline constexpr int kBlockCells = 64;

inline float value_of(Format format, const std::byte* row, int i) {
  switch (format) {
    case Format::F32: {
      float x;
      std::memcpy(&x, row + 4 * i, 4);
      return x;
    }
    case Format::F16: {
      __half x;
      std::memcpy(&x, row + 2 * i, 2);
      return __half2float(x);
    }
    case Format::BF16: {
      __nv_bfloat16 x;
      std::memcpy(&x, row + 2 * i, 2);
      return __bfloat162float(x);
    }
    default: {
      __half d;
      std::memcpy(&d, row + i / 32 * 34, 2);
      return __half2float(d) *
             static_cast<float>(static_cast<int8_t>(row[i / 32 * 34 + 2 + i % 32]));
    }
  }
}

inline void store_value(Format format, std::byte* row, int i, float x) {
  if (format == Format::F32) std::memcpy(row + 4 * i, &x, 4);
  if (format == Format::F16) {
    const __half y = __float2half_rn(x);
    std::memcpy(row + 2 * i, &y, 2);
  }
  if (format == Format::BF16) {
    const __nv_bfloat16 y = __float2bfloat16_rn(x);
    std::memcpy(row + 2 * i, &y, 2);
  }
  if (format == Format::Q8_0) {
    const __half d = __float2half_rn(4.0f / 127);
    std::memcpy(row + i / 32 * 34, &d, 2);
    row[i / 32 * 34 + 2 + i % 32] =
        static_cast<std::byte>(static_cast<int8_t>(std::clamp(x * 127 / 4, -127.0f, 127.0f)));
  }
}

// Operands on the host, with a cache whose blocks lie in a shuffled order.
struct Data {
  std::vector<float> q_nope, q_rope;  // [T, H, N], [T, H, R]
  std::vector<__half> k_b, v_b;       // [H, C, N] or [H, N, C], [H, V, C]
  std::vector<std::byte> cache;       // [cells, latent | rope]
  int64_t cell_bytes, rope_begin, n_cells;
  std::vector<Span> spans;
  std::vector<int32_t> table;  // [spans, blocks]
  int t, n_blocks;

  const std::byte* cell(const Span& s, int i) const {
    const int at = s.first_cell + i;
    const int32_t block = table[static_cast<size_t>(s.sequence * n_blocks + at / kBlockCells)];
    return cache.data() + (int64_t{block} * kBlockCells + at % kBlockCells) * cell_bytes;
  }
};

// A cheap normal-ish number: the sum of four uniform ones.
struct Noise {
  std::minstd_rand bits;
  float operator()() {
    uint32_t x = static_cast<uint32_t>(bits()) * 2654435761u;
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<float>((x >> (8 * i)) & 255u);
    return (sum - 510.0f) / 148.0f;
  }
};

inline Data make_data(const Case& c) {
  Data d;
  Noise noise{std::minstd_rand(7)};
  int token = 0, blocks = 0;
  d.n_blocks = 0;
  for (size_t i = 0; i < c.spans.size(); ++i) {
    const int skip = static_cast<int>(i * 5 % 9);
    const int n = (c.spans[i].n_cells + skip - 1) / kBlockCells + 1;
    d.spans.push_back({static_cast<int>(i), token, c.spans[i].n_tokens, skip, c.spans[i].n_cells,
                       c.spans[i].expanded ? 1 : 0});
    token += c.spans[i].n_tokens;
    blocks += n;
    d.n_blocks = std::max(d.n_blocks, n);
  }
  d.t = token;
  d.n_cells = int64_t{blocks} * kBlockCells;
  d.table.assign(c.spans.size() * static_cast<size_t>(d.n_blocks), -1);
  int next = 0;
  for (const Span& s : d.spans) {
    for (int i = 0; i * kBlockCells < s.first_cell + s.n_cells; ++i, ++next) {
      // 7919 is prime: a permutation of the blocks unless it divides their number.
      d.table[static_cast<size_t>(s.sequence * d.n_blocks + i)] =
          static_cast<int32_t>(int64_t{next} * 7919 % blocks);
    }
  }
  const auto fill = [&](auto& x, int64_t n, float scale) {
    x.resize(static_cast<size_t>(n));
    for (auto& e : x) e = static_cast<std::decay_t<decltype(e)>>(noise() * scale);
  };
  fill(d.q_nope, int64_t{d.t} * c.h * c.n, 1.0f);
  fill(d.q_rope, int64_t{d.t} * c.h * c.r, 1.0f);
  const float width = 1.0f / std::sqrt(static_cast<float>(c.c));
  fill(d.k_b, int64_t{c.h} * c.n * c.c, width);
  fill(d.v_b, int64_t{c.h} * c.v * c.c, width);
  d.rope_begin = row_bytes(c.latent, c.c);
  d.cell_bytes = (d.rope_begin + row_bytes(c.rope, c.r) + 3) / 4 * 4;
  d.cache.assign(static_cast<size_t>(d.n_cells * d.cell_bytes), std::byte{0xff});
  for (const Span& s : d.spans) {
    for (int i = 0; i < s.n_cells; ++i) {
      auto* row = const_cast<std::byte*>(d.cell(s, i));
      for (int j = 0; j < c.c; ++j) store_value(c.latent, row, j, noise());
      for (int j = 0; j < c.r; ++j) store_value(c.rope, row + d.rope_begin, j, noise());
    }
  }
  return d;
}

// Query (token, head) in float64, in the latent space: q k_b^T first, then the values.
inline std::vector<double> expected(const Case& c, const Data& d, const Span& s, int j, int head) {
  const int64_t at = int64_t{s.first_token + j} * c.h + head;
  std::vector<double> q(static_cast<size_t>(c.c), 0.0), mix(static_cast<size_t>(c.c), 0.0);
  for (int i = 0; i < c.c; ++i) {
    for (int k = 0; k < c.n; ++k) {
      const int64_t w = c.k_b_transposed ? (int64_t{head} * c.n + k) * c.c + i
                                         : (int64_t{head} * c.c + i) * c.n + k;
      q[static_cast<size_t>(i)] += double{d.q_nope[static_cast<size_t>(at * c.n + k)]} *
                                   double{__half2float(d.k_b[static_cast<size_t>(w)])};
    }
  }
  std::vector<double> score(static_cast<size_t>(s.n_cells - s.n_tokens + 1 + j));
  double top = -INFINITY, sum = 0;
  for (size_t i = 0; i < score.size(); ++i) {
    const std::byte* row = d.cell(s, static_cast<int>(i));
    double x = 0;
    for (int k = 0; k < c.c; ++k)
      x += q[static_cast<size_t>(k)] * double{value_of(c.latent, row, k)};
    for (int k = 0; k < c.r; ++k) {
      x += double{d.q_rope[static_cast<size_t>(at * c.r + k)]} *
           double{value_of(c.rope, row + d.rope_begin, k)};
    }
    score[i] = x * double{c.scale};
    top = std::max(top, score[i]);
  }
  for (size_t i = 0; i < score.size(); ++i) {
    const double p = std::exp(score[i] - top);
    sum += p;
    const std::byte* row = d.cell(s, static_cast<int>(i));
    for (int k = 0; k < c.c; ++k)
      mix[static_cast<size_t>(k)] += p * double{value_of(c.latent, row, k)};
  }
  std::vector<double> out(static_cast<size_t>(c.v), 0.0);
  for (int i = 0; i < c.v; ++i) {
    for (int k = 0; k < c.c; ++k) {
      const auto w = static_cast<size_t>((int64_t{head} * c.v + i) * c.c + k);
      out[static_cast<size_t>(i)] +=
          mix[static_cast<size_t>(k)] / sum * double{__half2float(d.v_b[w])};
    }
  }
  return out;
}

// The node of a case with its operands on the device.
class OnDevice {
 public:
  OnDevice(const Case& c, const Data& d, Stream stream) : stream_(stream) {
    Node* q_nope = leaf("q_nope", Format::F32, {d.t, c.h, c.n}, d.q_nope);
    Node* q_rope = leaf("q_rope", Format::F32, {d.t, c.h, c.r}, d.q_rope);
    const std::byte* cache = upload(d.cache.data(), d.cache.size());
    const auto plane = [&](const char* name, Format format, int width, int64_t begin) {
      Layout layout = Layout::contiguous(format, Shape{d.n_cells, width});
      layout.stride[2] = d.cell_bytes;
      return graph_.state(name, Tensor(layout, const_cast<std::byte*>(cache) + begin));
    };
    const CacheNodes planes = {plane("latent", c.latent, c.c, 0),
                               plane("rope", c.rope, c.r, d.rope_begin)};
    const Shape k_shape = c.k_b_transposed ? Shape{c.h, c.n, c.c} : Shape{c.h, c.c, c.n};
    Node* k_b = leaf("k_b", Format::F16, k_shape, d.k_b);
    Node* v_b = leaf("v_b", Format::F16, {c.h, c.v, c.c}, d.v_b);
    Node* spans = leaf("spans", Format::I32, {int64_t(d.spans.size()), 6}, d.spans);
    Node* table = leaf("table", Format::I32, {int64_t(d.spans.size()), d.n_blocks}, d.table);
    AttentionAttrs attrs;
    attrs.scale = c.scale;
    attrs.k_b_transposed = c.k_b_transposed;
    attrs.block_cells = kBlockCells;
    step_.node = mla_attention(graph_, q_nope, q_rope, planes, k_b, v_b, spans, table, attrs);
    for (size_t i = 0; i < step_.node->inputs.size(); ++i) {
      step_.in[i] = Tensor(step_.node->inputs[i]->layout, step_.node->inputs[i]->constant);
    }
    const auto n_out = static_cast<size_t>(step_.node->shape().n_elems());
    const std::vector<float> zeros(n_out, 0.0f);
    step_.out = Tensor(step_.node->layout,
                       const_cast<std::byte*>(upload(zeros.data(), n_out * sizeof(float))));
  }
  const Step& step() const { return step_; }
  std::vector<float> result() const {
    std::vector<float> out(static_cast<size_t>(step_.out.shape.n_elems()));
    copy_async(out.data(), step_.out.data, out.size() * sizeof(float), stream_);
    sync_stream(stream_);
    return out;
  }

 private:
  const std::byte* upload(const void* data, size_t bytes) {
    memory_.push_back(device_buffer(bytes));
    copy_async(memory_.back().get(), data, bytes, stream_);
    sync_stream(stream_);
    return memory_.back().get();
  }
  template <class X>
  Node* leaf(const char* name, Format format, const Shape& shape, const std::vector<X>& data) {
    auto* memory = const_cast<std::byte*>(upload(data.data(), data.size() * sizeof(X)));
    return graph_.weight(name, Tensor(Layout::contiguous(format, shape), memory));
  }
  Stream stream_;
  Graph graph_;
  std::vector<std::shared_ptr<std::byte>> memory_;
  Step step_;
};

// Normalized mean square error over n_samples queries, or over all where there are fewer.
inline double error_of(const Case& c, const Data& d, const std::vector<float>& got,
                       int64_t n_samples) {
  double wrong = 0, total = 1e-300;
  for (const Span& s : d.spans) {
    const int64_t n = int64_t{s.n_tokens} * c.h;
    const int64_t step = std::max<int64_t>(n / n_samples, 1) | 1;
    for (int64_t i = n - 1; i >= 0; i -= step) {
      const int j = static_cast<int>(i / c.h), head = static_cast<int>(i % c.h);
      const std::vector<double> want =
          s.expanded != 0 ? expected(c, d, s, j, head) : std::vector<double>(size_t(c.v), 0.0);
      for (int k = 0; k < c.v; ++k) {
        const int64_t at = (int64_t{s.first_token + j} * c.h + head) * c.v + k;
        const double x = double{got[static_cast<size_t>(at)]} - want[static_cast<size_t>(k)];
        wrong += x * x;
        total += want[static_cast<size_t>(k)] * want[static_cast<size_t>(k)];
      }
    }
  }
  return wrong / total;
}

// f16 keys, values and weights of the softmax, 2^-11 each, and f16 queries.
inline constexpr double kMaxError = 2e-6;

// As a device that multiplies without warpgroups, which the same code runs on.
inline DeviceInfo portable(DeviceInfo device) {
  device.major = 8;
  device.minor = 0;
  return device;
}

// Runs the case once; prints and returns whether it was right. n_samples: queries of each span.
inline bool compare(const Case& c, const Data& d, const OnDevice& on, const CudaRun& run,
                    int64_t n_samples) {
  attention_expanded(on.step(), run, c.max_cell_bytes);
  const double error = error_of(c, d, on.result(), n_samples);
  const bool good = error <= kMaxError;
  std::printf("%-28s %d.%d  nmse %.2e  %s\n", c.name.c_str(), run.device.major, run.device.minor,
              error, good ? "good" : "WRONG");
  std::fflush(stdout);
  return good;
}

}  // namespace mla::cuda::test
