// Absorbed attention alone, kernel by kernel, on the shapes of 16 and 128 heads over a latent cache
// of 512 + 64 numbers: first compared with float64 at some rows, then timed in a recorded graph.
//
//   attention_bench          real shapes, then chains of 27 layers with weights and caches of their
//                            own, one token: what a decoded token sees
//   attention_bench chain    the chains alone
//   attention_bench check    small shapes, no times: also on the emulated device
//
// TB/s counts each cell of the cache once, TFLOP/s 2 (576 + 512) per row and cell that it sees.
// Exit status 0: all comparisons hold.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backends/cuda/attention_absorbed.h"
#include "backends/cuda/kernels/attention_common.cuh"

namespace mla::cuda {
namespace {

constexpr int kBlockCells = 64;
constexpr int kLatent = 512, kRope = 64, kNope = 128, kValue = 128;
constexpr int kThreads = 256;
constexpr int kRepeats = 20;  // of a kernel in a recorded graph
constexpr int kSamples = 16;  // rows compared
constexpr int kLayers = 27;   // of a chain

struct Case {
  int heads, batch, cells;
  Format latent = Format::F16;
  int tokens = 1;  // of each sequence
};

__device__ uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
__device__ float uniform(int64_t i, uint32_t seed) {  // [-1, 1)
  return static_cast<float>(mix(static_cast<uint32_t>(i) * 2654435761u + seed) & 0xffffu) /
             32768.0f -
         1.0f;
}

__global__ void fill_floats(float* out, int64_t n, uint32_t seed) {
  pdl_wait();
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += stride) {
    out[i] = uniform(i, seed);
  }
}
__global__ void fill_16(__half* out, int64_t n, bool bf16, uint32_t seed) {
  pdl_wait();
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += stride) {
    const float x = uniform(i, seed);
    if (bf16) {
      reinterpret_cast<__nv_bfloat16*>(out)[i] = __float2bfloat16_rn(x);
    } else {
      out[i] = __float2half_rn(x);
    }
  }
}
// Rows of 16 blocks of Q8_0, then 64 halves.
__global__ void fill_q8(std::byte* out, int64_t n_rows, int64_t row_bytes, uint32_t seed) {
  pdl_wait();
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int64_t words = row_bytes / 2;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n_rows * words; i += stride) {
    const int64_t at = i % words;
    const bool is_number = at >= kLatent / 32 * kQ8Bytes / 2;
    const bool is_scale = at % (kQ8Bytes / 2) == 0;
    const uint16_t bits = is_number  ? __half_as_ushort(__float2half_rn(uniform(i, seed)))
                          : is_scale ? __half_as_ushort(__float2half_rn(1.0f / 127.0f))
                                     : static_cast<uint16_t>(mix(static_cast<uint32_t>(i) + seed));
    reinterpret_cast<uint16_t*>(out)[i] = bits;
  }
}

// ---- the comparison -----------------------------------------------------------------------------
// One block per sampled row; scores [samples][max_cells] in float64.
__global__ void reference(AttentionArgs a, const int* rows, double* scores, int max_cells,
                          double* out) {
  pdl_wait();
  __shared__ double q[kLatent + kRope], acc[kLatent], sums[kThreads];
  const int token = rows[blockIdx.x] / a.h, head = rows[blockIdx.x] % a.h;
  const Span span = load_span(a, find_span(a, token)).span;
  const int n = visible_cells(span, token - span.first_token);
  const auto* k_b = reinterpret_cast<const __half*>(a.k_b.data + head * a.k_b.stride[1]);
  const auto* v_b = reinterpret_cast<const __half*>(a.v_b.data + head * a.v_b.stride[1]);
  for (int d = threadIdx.x; d < kLatent + kRope; d += kThreads) {
    q[d] = d < kLatent ? 0 : query_value(a.q_rope, token, head, d - kLatent);
    for (int i = 0; i < (d < kLatent ? kNope : 0); ++i) {
      q[d] +=
          double(query_value(a.q_nope, token, head, i)) * double(__half2float(k_b[d * kNope + i]));
    }
  }
  __syncthreads();
  scores += int64_t{blockIdx.x} * max_cells;
  double sum = 0;  // scores stay below 100: no maximum is needed
  for (int cell = threadIdx.x; cell < n; cell += kThreads) {
    const int64_t row = cache_row(a, span, cell);
    double s = 0;
    for (int d = 0; d < kLatent; ++d) {
      s += q[d] * double(cache_value(cell_at(a.latent, row), a.latent.format, d));
    }
    for (int d = 0; d < kRope; ++d) {
      s += q[kLatent + d] * double(cache_value(cell_at(a.rope, row), a.rope.format, d));
    }
    scores[cell] = exp(double(a.scale) * s);
    sum += scores[cell];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kThreads; ++i) total += sums[i];
  for (int d = threadIdx.x; d < kLatent; d += kThreads) {
    double x = 0;
    for (int cell = 0; cell < n; ++cell) {
      const std::byte* row = cell_at(a.latent, cache_row(a, span, cell));
      x += scores[cell] * double(cache_value(row, a.latent.format, d));
    }
    acc[d] = x / total;
  }
  __syncthreads();
  for (int v = threadIdx.x; v < kValue; v += kThreads) {
    double x = 0;
    for (int d = 0; d < kLatent; ++d) x += acc[d] * double(__half2float(v_b[v * kLatent + d]));
    out[blockIdx.x * kValue + v] = x;
  }
}

// ---- one case -----------------------------------------------------------------------------------
template <class T>
struct Memory {
  explicit Memory(int64_t n) : n(n), buffer(device_buffer(static_cast<size_t>(n) * sizeof(T))) {}
  T* get() const { return reinterpret_cast<T*>(buffer.get()); }
  void set(const std::vector<T>& values, Stream stream) const {
    copy_async(get(), values.data(), values.size() * sizeof(T), stream);
    sync_stream(stream);
  }
  std::vector<T> values(Stream stream) const {
    std::vector<T> out(static_cast<size_t>(n));
    copy_async(out.data(), get(), out.size() * sizeof(T), stream);
    sync_stream(stream);
    return out;
  }
  int64_t n;
  std::shared_ptr<std::byte> buffer;
};

int64_t cell_bytes(const Case& c) {
  return (c.latent == Format::Q8_0 ? kLatent / 32 * kQ8Bytes : 2 * kLatent) + 2 * kRope;
}
View matrix_view(const void* data, Format format, int64_t e1, int64_t e2, int64_t e3,
                 int64_t elem_bytes) {
  auto* bytes = const_cast<std::byte*>(static_cast<const std::byte*>(data));
  return {bytes, format, {1, e1, e2, e3}, {0, e2 * e3 * elem_bytes, e3 * elem_bytes, elem_bytes}};
}

// All memory of a case, filled.
struct Problem {
  Problem(const Case& c, const CudaRun& run)
      : n_blocks((c.cells + kBlockCells - 1) / kBlockCells),
        n_tokens(c.batch * c.tokens),
        n_cells(int64_t{c.batch} * n_blocks * kBlockCells),
        q_nope(int64_t{n_tokens} * c.heads * kNope),
        q_rope(int64_t{n_tokens} * c.heads * kRope),
        cache(n_cells * cell_bytes(c)),
        k_b(int64_t{c.heads} * kLatent * kNope),
        v_b(int64_t{c.heads} * kLatent * kValue),
        spans(int64_t{c.batch} * 6),
        table(int64_t{c.batch} * n_blocks),
        out(int64_t{n_tokens} * c.heads * kValue) {
    const dim3 grid(1024), block(kThreads);
    launch(run, fill_floats, grid, block, 0, q_nope.get(), q_nope.n, 1u);
    launch(run, fill_floats, grid, block, 0, q_rope.get(), q_rope.n, 2u);
    launch(run, fill_16, grid, block, 0, k_b.get(), k_b.n, false, 3u);
    launch(run, fill_16, grid, block, 0, v_b.get(), v_b.n, false, 4u);
    if (c.latent == Format::Q8_0) {
      launch(run, fill_q8, grid, block, 0, cache.get(), n_cells, cell_bytes(c), 5u);
    } else {
      launch(run, fill_16, grid, block, 0, reinterpret_cast<__half*>(cache.get()), cache.n / 2,
             c.latent == Format::BF16, 5u);
    }
    std::vector<int32_t> list, blocks(static_cast<size_t>(table.n));
    for (int i = 0; i < c.batch; ++i) {
      for (int x : {i, i * c.tokens, c.tokens, 0, c.cells, 0}) list.push_back(x);
    }
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(6));
    spans.set(list, run.stream);
    table.set(blocks, run.stream);
  }

  AttentionArgs args(const Case& c) const {
    AttentionArgs a = {};
    a.t = n_tokens;
    a.h = c.heads;
    a.n = kNope;
    a.r = kRope;
    a.c = kLatent;
    a.v = kValue;
    // Scores of variance 4: q_lat . latent has variance C N / 27, numbers being uniform.
    a.scale = 2.0f / std::sqrt(float(kLatent) * kNope / 27.0f);
    a.q_nope = matrix_view(q_nope.get(), Format::F32, n_tokens, c.heads, kNope, 4);
    a.q_rope = matrix_view(q_rope.get(), Format::F32, n_tokens, c.heads, kRope, 4);
    const Format rope = c.latent == Format::BF16 ? Format::BF16 : Format::F16;
    a.latent = {cache.get(), cell_bytes(c), c.latent, kLatent};
    a.rope = {cache.get() + cell_bytes(c) - 2 * kRope, cell_bytes(c), rope, kRope};
    a.n_cells = n_cells;
    a.k_b = matrix_view(k_b.get(), Format::F16, c.heads, kLatent, kNope, 2);
    a.v_b = matrix_view(v_b.get(), Format::F16, c.heads, kValue, kLatent, 2);
    a.spans = spans.get();
    a.span_stride = 6;
    a.n_spans = c.batch;
    a.table = table.get();
    a.table_stride = n_blocks;
    a.n_sequences = c.batch;
    a.n_blocks = n_blocks;
    a.block_cells = kBlockCells;
    a.spans_given = true;
    a.q_fours = true;
    a.out = out.get();
    return a;
  }

  int n_blocks, n_tokens;
  int64_t n_cells;
  Memory<float> q_nope, q_rope;
  Memory<std::byte> cache;
  Memory<__half> k_b, v_b;
  Memory<int32_t> spans, table;
  Memory<float> out;
};

// Normalized mean square error over sampled rows.
double error_of(const Case& c, const Problem& p, const AttentionArgs& a, const CudaRun& run) {
  std::mt19937 random(7);
  std::vector<int> rows(kSamples);
  for (int& row : rows) row = static_cast<int>(random() % static_cast<unsigned>(a.t * a.h));
  const Memory<int> sampled(kSamples);
  const Memory<double> scores(int64_t{kSamples} * c.cells), want(int64_t{kSamples} * kValue);
  sampled.set(rows, run.stream);
  launch(run, reference, dim3(kSamples), dim3(kThreads), 0, a, sampled.get(), scores.get(), c.cells,
         want.get());
  const std::vector<double> expected = want.values(run.stream);
  const std::vector<float> got = p.out.values(run.stream);
  double error = 0, power = 0;
  for (int i = 0; i < kSamples; ++i) {
    for (int v = 0; v < kValue; ++v) {
      const double x = expected[static_cast<size_t>(i * kValue + v)];
      const double y =
          got[static_cast<size_t>(rows[static_cast<size_t>(i)]) * kValue + static_cast<size_t>(v)];
      error += (x - y) * (x - y);
      power += x * x;
    }
  }
  return error / power;
}

// Microseconds of one call among n in a recorded graph, the best of several replays.
double time_us(const CudaRun& run, int n, const std::function<void(int)>& call) {
  begin_recording(run.stream);
  for (int i = 0; i < n; ++i) call(i);
  const RecordedGraph graph = end_recording(run.stream);
  Event start, end;
  double best = 1e30;
  for (int i = 0; i < 8; ++i) {
    start.record(run.stream);
    graph.launch(run.stream);
    end.record(run.stream);
    end.sync();
    best = std::min(best, end.since_ms(start) * 1e3 / n);
  }
  return best;
}

bool run_case(const Case& c, const DeviceInfo& device, bool timed) {
  const Stream stream = create_stream();
  CudaRun run{device, stream, nullptr};
  const Problem problem(c, run);
  const AttentionArgs a = problem.args(c);
  size_t scratch_bytes = 0;
  absorbed_plan(a, device, nullptr, &scratch_bytes);
  const Memory<std::byte> scratch(static_cast<int64_t>(scratch_bytes));
  run.scratch = scratch.get();
  const AbsorbedPlan plan = absorbed_plan(a, device, run.scratch);
  const auto queries = [&] { launch_queries(a, plan, run); };
  const auto attend = [&] { launch_attend(a, plan, run); };
  const auto values = [&] { launch_values(a, plan, run); };
  const auto all = [&] { queries(), attend(), values(); };
  all();
  const double error = error_of(c, problem, a, run);
  const bool good = error < (c.latent == Format::BF16 ? 1e-4 : 1e-5);
  std::printf("%3d heads  %3d x %d tokens  %6d cells  %-4s  nmse %.1e%s", c.heads, c.batch,
              c.tokens, c.cells, std::string(format_name(c.latent)).c_str(), error,
              good ? "" : " TOO LARGE");
  if (timed) {
    const double flop = 2.0 * (2 * kLatent + kRope) * c.heads * problem.n_tokens * c.cells;
    const double bytes = double(c.batch) * c.cells * double(cell_bytes(c));
    const auto time = [&](const auto& call) {
      return time_us(run, kRepeats, [&](int) { call(); });
    };
    const double q = time(queries), t = time(attend), v = time(values);
    std::printf(
        "  queries %6.2f us  attend %8.2f us %5.2f TB/s %5.0f TFLOP/s  values %6.2f us  "
        "all %8.2f us",
        q, t, bytes / t * 1e-6, flop / t * 1e-6, v, time(all));
  }
  std::printf("\n");
  destroy_stream(stream);
  return good;
}

// Per layer, where the layers follow one another: in place of what lies between them in a model
// stands nothing.
void run_chain(const Case& c, const DeviceInfo& device) {
  const Stream stream = create_stream();
  CudaRun run{device, stream, nullptr};
  std::vector<Problem> layers;
  for (int i = 0; i < kLayers; ++i) layers.emplace_back(c, run);
  const AttentionArgs first = layers[0].args(c);
  size_t scratch_bytes = 0;
  absorbed_plan(first, device, nullptr, &scratch_bytes);
  const Memory<std::byte> scratch(static_cast<int64_t>(scratch_bytes));
  run.scratch = scratch.get();
  const AbsorbedPlan plan = absorbed_plan(first, device, run.scratch);
  const auto time = [&](bool queries, bool attend, bool values) {
    return time_us(run, kLayers, [&](int i) {
      const AttentionArgs a = layers[static_cast<size_t>(i)].args(c);
      if (queries) launch_queries(a, plan, run);
      if (attend) launch_attend(a, plan, run);
      if (values) launch_values(a, plan, run);
    });
  };
  const double all = time(true, true, true);
  std::printf(
      "chain %3d heads  %6d cells  %-4s  all %6.2f us  queries %5.2f  attend %6.2f  values %5.2f\n",
      c.heads, c.cells, std::string(format_name(c.latent)).c_str(), all, time(true, false, false),
      time(false, true, false), time(false, false, true));
  destroy_stream(stream);
}

void run_chains(const DeviceInfo& device) {
  for (int cells : {64, 512, 1024, 4096, 16384}) run_chain({16, 1, cells}, device);
  run_chain({16, 1, 4096, Format::Q8_0}, device);
  run_chain({128, 1, 1024}, device);
}

std::vector<Case> cases(bool timed) {
  const Format q8 = Format::Q8_0, bf16 = Format::BF16;
  if (!timed) {
    return {{16, 1, 300}, {16, 3, 100, bf16}, {16, 2, 70, q8}, {128, 1, 130}, {16, 2, 90, q8, 5}};
  }
  std::vector<Case> list;
  for (int heads : {16, 128}) {
    for (int cells : {512, 4096, 16384, 32768, 65536, 131072}) list.push_back({heads, 1, cells});
    for (int batch : {8, 32, 128}) list.push_back({heads, batch, 4096});
    list.push_back({heads, 1, 131072, q8});
    list.push_back({heads, 128, 4096, q8});
    list.push_back({heads, 128, 4096, bf16});
    list.push_back({heads, 1, 4096, Format::F16, 4});
    list.push_back({heads, 1, 16384, Format::F16, 64});
  }
  return list;
}

}  // namespace
}  // namespace mla::cuda

int main(int argc, char** argv) {
  using namespace mla::cuda;
  const std::string what = argc < 2 ? "" : argv[1];
  const bool timed = what != "check";
  use_device(0);
  const DeviceInfo device = device_info(0);
  std::printf("%s, %d SMs\n", device.name.c_str(), device.n_sm);
  bool good = true;
  if (what != "chain") {
    for (const Case& c : cases(timed)) good = run_case(c, device, timed) && good;
  }
  if (timed) run_chains(device);
  return good ? 0 : 1;
}
