// Times of products of gemm.h and of what prepares them, on the shapes of DeepSeek-sized models,
// each product first compared at a million places with sums by one thread each.
// Exit status 0: all comparisons hold. An argument limits the run to lines that contain it.
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backends/cuda/dequantize.h"
#include "backends/cuda/expert_sort.h"
#include "backends/cuda/gemm.h"
#include "backends/cuda/gemm_plan.h"
#include "backends/cuda/gemm_wgmma.h"
#include "backends/cuda/kernels/intrinsics.cuh"
#include "backends/cuda/packed.h"
#include "base/half.h"

namespace mla::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSamples = 1 << 20;

__device__ uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

__global__ void fill_halves(__half* out, int64_t n, uint32_t seed) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += stride) {
    const uint32_t bits = mix(static_cast<uint32_t>(i) * 2654435761u + seed);
    out[i] = __float2half_rn(static_cast<float>(bits & 0xffffu) / 32768.0f - 1.0f);
  }
}

// Worst error of sampled elements as a share of the sum of magnitudes, as float bits.
struct Sampled {
  const __half *a, *b;
  const float* c;
  int64_t m, n, k;
  // Grouped: row r of c is pair r; its expert, and its token's row of a.
  const int* expert_of_pair;
  int per_token;
  bool rows_are_pairs;
};
__global__ void sample_errors(Sampled s, int* worst) {
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x;
  const int64_t row = mix(at) % s.m, column = mix(at + 0x9e3779b9u) % s.n;
  const int64_t expert = s.expert_of_pair != nullptr ? s.expert_of_pair[row] : 0;
  const int64_t a_row = s.rows_are_pairs ? row : row / s.per_token;
  const __half *a = s.a + a_row * s.k, *b = s.b + (expert * s.n + column) * s.k;
  double sum = 0, magnitude = 0;
  for (int64_t i = 0; i < s.k; ++i) {
    const double product = double(__half2float(a[i])) * double(__half2float(b[i]));
    sum += product;
    magnitude += fabs(product);
  }
  const double error = fabs(double(s.c[row * s.n + column]) - sum) / (magnitude + 1e-30);
  atomicMax(worst, error == error ? __float_as_int(static_cast<float>(error)) : 0x7fffffff);
}

template <class T>
struct Memory {
  explicit Memory(int64_t n) : buffer(device_buffer(static_cast<size_t>(n) * sizeof(T))) {}
  T* get() const { return reinterpret_cast<T*>(buffer.get()); }
  std::shared_ptr<std::byte> buffer;
};

struct Bench {
  DeviceInfo device;
  Stream stream;
  std::string only;
  bool good = true;

  CudaRun run() const { return {device, stream, nullptr}; }

  // Mean of 10 after 2.
  double us(const std::function<void()>& work) const {
    constexpr int kTimes = 10;
    Event start, end;
    for (int i = 0; i < 2; ++i) work();
    start.record(stream);
    for (int i = 0; i < kTimes; ++i) work();
    end.record(stream);
    end.sync();
    return 1e3 * static_cast<double>(end.since_ms(start)) / kTimes;
  }
  void fill(const Memory<__half>& x, int64_t n, uint32_t seed) const {
    launch(run(), fill_halves, dim3(1024), dim3(kThreads), 0, x.get(), n, seed);
  }
  // float32 sums in some order: k * 2^-24 at the very worst, far less for signs at random.
  double error_of(const Sampled& s) {
    Memory<int> worst(1);
    fill_async(worst.get(), std::byte{0}, sizeof(int), stream);
    launch(run(), sample_errors, dim3(kSamples / kThreads), dim3(kThreads), 0, s, worst.get());
    float error = 0;
    copy_async(&error, worst.get(), sizeof(error), stream);
    sync_stream(stream);
    if (!(error < 2e-6f)) good = false;
    return static_cast<double>(error);
  }
};

std::string verdict(double error) { return error < 2e-6 ? "ok" : "WRONG"; }

// rows packed rows: 64 random ones, over and over. Scales of about 0.01; quants are any bytes.
Memory<std::byte> random_packed(const Bench& b, Format format, int64_t rows, int64_t k) {
  constexpr int64_t kDistinct = 64;
  const int64_t row_bytes = packed_row_bytes(format, k);
  const auto& fields = packed_fields(format);
  const int64_t n_blocks = k / traits(format).block_elems;
  std::mt19937 rng(7);
  std::vector<std::byte> host(static_cast<size_t>(kDistinct * row_bytes));
  for (std::byte& x : host) x = static_cast<std::byte>(rng() & 255u);
  const uint16_t d = float_to_half(0.01f);
  for (int64_t row = 0; row < kDistinct; ++row) {
    for (int p = 0; p < kMaxPlanes; ++p) {
      const int bytes = fields[static_cast<size_t>(p)].bytes;
      const bool has_scale = bytes == 2 || bytes == 16 || (bytes == 4 && format != Format::Q5_0);
      if (!has_scale || p == 0) continue;
      for (int64_t i = 0; i < n_blocks; ++i) {
        std::byte* at =
            host.data() + row * row_bytes + plane_offset(fields, p, n_blocks) + i * bytes;
        std::memcpy(at, &d, 2);
        if (bytes > 2) std::memcpy(at + 2, &d, 2);
      }
    }
  }
  Memory<std::byte> out(rows * row_bytes);
  for (int64_t row = 0; row < rows; row += kDistinct) {
    const int64_t n = std::min(kDistinct, rows - row);
    copy_async(out.get() + row * row_bytes, host.data(), static_cast<size_t>(n * row_bytes),
               b.stream);
  }
  sync_stream(b.stream);
  return out;
}

View packed_view(const Memory<std::byte>& data, Format format, int64_t rows, int64_t k) {
  return {data.get(), format, {1, 1, rows, k}, {0, 0, packed_row_bytes(format, k), 0}};
}

void print_dequantize(const char* what, double us, double bytes) {
  std::printf("  %-46s %9.1f us  %7.2f TB/s\n", what, us, bytes / us / 1e6);
}

// One weight matrix at several numbers of tokens, dequantization apart and included.
void dense_quantized(Bench& b, Format format, int64_t n, int64_t k, std::vector<int> tokens) {
  const std::string name =
      std::string(format_name(format)) + " " + std::to_string(n) + " x " + std::to_string(k);
  if (name.find(b.only) == std::string::npos) return;
  std::printf("%s\n", name.c_str());
  const int64_t most = *std::max_element(tokens.begin(), tokens.end());
  const Memory<std::byte> packed = random_packed(b, format, n, k);
  const View view = packed_view(packed, format, n, k);
  const Memory<__half> w(n * k), x(most * k);
  const Memory<float> c(most * n), scale(most), source(most * k);
  b.fill(x, most * k, 1);
  fill_async(source.get(), std::byte{0}, static_cast<size_t>(most * k) * 4, b.stream);
  const auto dequantize = [&] { dequantize_rows(b.run(), view, 0, n, Operand::f16, w.get(), k); };
  const double us = b.us(dequantize);
  print_dequantize("dequantized to f16", us,
                   static_cast<double>(n * (packed_row_bytes(format, k) + 2 * k)));
  for (const int m : tokens) {
    Gemm g;
    g.m = m, g.n = static_cast<int>(n), g.k = static_cast<int>(k);
    g.a = x.get(), g.b = w.get(), g.c = c.get(), g.lda = g.ldb = k, g.ldc = n;
    g.scratch_bytes = gemm_scratch_bytes(g, b.device);
    const Memory<std::byte> scratch(static_cast<int64_t>(g.scratch_bytes) + 16);
    g.scratch = scratch.get();
    gemm(b.run(), g);
    const double error = b.error_of({x.get(), w.get(), c.get(), m, n, k, nullptr, 1, true});
    const double alone = b.us([&] { gemm(b.run(), g); });
    const double both = b.us([&] { dequantize(), gemm(b.run(), g); });
    const double flops = 2.0 * m * static_cast<double>(n * k);
    std::printf(
        "  m %5d  %-36s %9.1f us  %6.1f TFLOP/s; with dequantization %9.1f us  %6.1f  %s %.1e\n", m,
        plan_gemm(g, b.device, has_wgmma(b.device)).str().c_str(), alone, flops / alone / 1e6, both,
        flops / both / 1e6, verdict(error).c_str(), error);
    std::fflush(stdout);
  }
}

// f16 operands alone: the plans for the smaller shapes.
void dense_plain(Bench& b, int m, int64_t n, int64_t k, bool fused) {
  const std::string name = "f16 " + std::to_string(m) + " x " + std::to_string(n) + " x " +
                           std::to_string(k) + (fused ? " fused" : "");
  if (name.find(b.only) == std::string::npos) return;
  const Memory<__half> w(n * k), up(n * k), x(m * k);
  const Memory<float> c(m * n);
  b.fill(x, m * k, 1), b.fill(w, n * k, 2), b.fill(up, n * k, 3);
  Gemm g;
  g.m = m, g.n = static_cast<int>(n), g.k = static_cast<int>(k);
  g.a = x.get(), g.b = w.get(), g.b_up = fused ? up.get() : nullptr, g.c = c.get();
  g.lda = g.ldb = k, g.ldc = n;
  g.scratch_bytes = gemm_scratch_bytes(g, b.device);
  const Memory<std::byte> scratch(static_cast<int64_t>(g.scratch_bytes) + 16);
  g.scratch = scratch.get();
  gemm(b.run(), g);
  const double error =
      fused ? 0 : b.error_of({x.get(), w.get(), c.get(), m, n, k, nullptr, 1, true});
  const double us = b.us([&] { gemm(b.run(), g); });
  const double flops = (fused ? 4.0 : 2.0) * m * static_cast<double>(n * k);
  std::printf("%-30s %-46s %9.1f us  %6.1f TFLOP/s  %s %.1e\n", name.c_str(),
              plan_gemm(g, b.device, has_wgmma(b.device)).str().c_str(), us, flops / us / 1e6,
              fused ? "unchecked" : verdict(error).c_str(), error);
  std::fflush(stdout);
}

std::vector<int> random_routes(int tokens, int per_token, int experts) {
  std::mt19937 rng(11);
  std::vector<int> ids, all(static_cast<size_t>(experts));
  std::iota(all.begin(), all.end(), 0);
  for (int t = 0; t < tokens; ++t) {
    std::shuffle(all.begin(), all.end(), rng);
    ids.insert(ids.end(), all.begin(), all.begin() + per_token);
  }
  return ids;
}

void grouped(Bench& b, Format format, int tokens, int per_token, int experts, int64_t n,
             int64_t k) {
  const std::string name = "experts " + std::string(format_name(format)) + " " +
                           std::to_string(experts) + " x " + std::to_string(n) + " x " +
                           std::to_string(k) + ", " + std::to_string(per_token) + " used, m " +
                           std::to_string(tokens);
  if (name.find(b.only) == std::string::npos) return;
  std::printf("%s\n", name.c_str());
  const int pairs = tokens * per_token;
  const Memory<std::byte> packed = random_packed(b, format, experts * n, k);
  const View view = packed_view(packed, format, experts * n, k);
  const Memory<__half> w(experts * n * k), x(pairs * k);
  const Memory<float> c(pairs * n);
  const Memory<int> ids(pairs), offsets(experts + 1), order(pairs);
  b.fill(x, pairs * k, 1);
  const std::vector<int> routes = random_routes(tokens, per_token, experts);
  copy_async(ids.get(), routes.data(), routes.size() * sizeof(int), b.stream);
  View routed{reinterpret_cast<std::byte*>(ids.get()),
              Format::I32,
              {1, 1, tokens, per_token},
              {0, 0, 4 * per_token, 4}};
  const auto sort = [&] {
    expert_sort(b.run(), routed, experts, nullptr, offsets.get(), order.get());
  };
  const auto dequantize = [&] {
    dequantize_rows(b.run(), view, 0, experts * n, Operand::f16, w.get(), k);
  };
  std::printf("  %-46s %9.1f us\n", "sorted", b.us(sort));
  print_dequantize("dequantized to f16", b.us(dequantize),
                   static_cast<double>(experts * n * (packed_row_bytes(format, k) + 2 * k)));
  GroupedGemm g;
  g.n_rows = pairs, g.n = static_cast<int>(n), g.k = static_cast<int>(k);
  g.n_experts = g.n_model_experts = experts;
  g.offsets = offsets.get(), g.sorted_pairs = order.get();
  g.a = x.get(), g.lda = g.ldb = k, g.b = w.get(), g.expert_stride = n * k;
  g.c = c.get(), g.ldc = n, g.scatter = true;
  const double flops = 2.0 * pairs * static_cast<double>(n * k);
  for (const bool gathered : {true, false}) {
    g.pairs_per_row = gathered ? per_token : 0;
    grouped_gemm(b.run(), g);
    double error = 0;
    if (gathered) {
      error = b.error_of({x.get(), w.get(), c.get(), pairs, n, k, ids.get(), per_token, false});
    }
    const double alone = b.us([&] { grouped_gemm(b.run(), g); });
    const double both = b.us([&] { sort(), dequantize(), grouped_gemm(b.run(), g); });
    std::printf(
        "  %-8s %-36s %9.1f us  %6.1f TFLOP/s; with sort and dequantization %9.1f us  %6.1f  %s "
        "%.1e\n",
        gathered ? "gathered" : "sorted",
        plan_grouped_gemm(g, b.device, has_wgmma(b.device)).str().c_str(), alone,
        flops / alone / 1e6, both, flops / both / 1e6,
        gathered ? verdict(error).c_str() : "unchecked", error);
  }
  g.pairs_per_row = per_token, g.b_up = w.get();
  const double fused = b.us([&] { grouped_gemm(b.run(), g); });
  std::printf("  %-8s %-36s %9.1f us  %6.1f TFLOP/s (two products)\n", "fused",
              plan_grouped_gemm(g, b.device, has_wgmma(b.device)).str().c_str(), fused,
              2 * flops / fused / 1e6);
  std::fflush(stdout);
}

void prepared(Bench& b, int64_t m, int64_t k) {
  const std::string name = "prepare " + std::to_string(m) + " x " + std::to_string(k);
  if (name.find(b.only) == std::string::npos) return;
  const Memory<float> x(m * k), scale(m);
  const Memory<__half> out(m * k);
  fill_async(x.get(), std::byte{0}, static_cast<size_t>(m * k) * 4, b.stream);
  const View view{
      reinterpret_cast<std::byte*>(x.get()), Format::F32, {1, 1, m, k}, {0, 0, 4 * k, 4}};
  const double us =
      b.us([&] { prepare_rows(b.run(), view, Operand::f16, out.get(), scale.get(), k); });
  print_dequantize(name.c_str(), us, 6.0 * static_cast<double>(m * k));
}

void all(Bench& b) {
  for (const Format format : {Format::Q4_K, Format::Q8_0, Format::Q6_K, Format::Q5_0}) {
    dense_quantized(b, format, 18432, 7168, {64, 512, 4096});
  }
  for (const Format format : {Format::Q4_K, Format::Q8_0}) {
    for (const int tokens : {64, 512, 4096}) grouped(b, format, tokens, 6, 64, 1408, 2048);
  }
  grouped(b, Format::Q4_K, 4096, 6, 64, 2048, 1536);
  for (const int m : {128, 512, 4096}) {
    for (const auto& [n, k] : std::vector<std::pair<int, int>>{
             {3072, 2048}, {576, 2048}, {2048, 2048}, {2816, 2048}, {2048, 2816}, {2048, 10944}}) {
      dense_plain(b, m, n, k, false);
    }
    dense_plain(b, m, 10944, 2048, true);
  }
  dense_plain(b, 8192, 8192, 8192, false);
  prepared(b, 512, 7168);
  prepared(b, 4096, 2048);
}

}  // namespace
}  // namespace mla::cuda

int main(int argc, char** argv) {
  using namespace mla::cuda;
  Bench bench{device_info(0), create_stream(), argc > 1 ? argv[1] : ""};
  std::printf("%s, %d.%d, %d multiprocessors\n", bench.device.name.c_str(), bench.device.major,
              bench.device.minor, bench.device.n_sm);
  all(bench);
  if (has_wgmma(bench.device)) {
    std::printf("as on an older device:\n");
    bench.device.major = 8;
    dense_quantized(bench, mla::Format::Q4_K, 18432, 7168, {512, 4096});
    grouped(bench, mla::Format::Q4_K, 4096, 6, 64, 1408, 2048);
  }
  destroy_stream(bench.stream);
  return bench.good ? 0 : 1;
}
