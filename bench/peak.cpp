// What this machine can do at best, as one line of JSON: memory reads, and multiply-adds in
// float32, bfloat16 and 8-bit integers, with as many threads as the argument says. Built by
// machine.py for the machine that runs it; not part of the package.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
// Beyond every cache that one socket has today, within what small machines have.
constexpr size_t kReadBytes = size_t{1} << 30;
constexpr int kRepeats = 5;
// Independent sums: latency 4-5 cycles times two units per cycle, and some to spare.
constexpr int kSums = 12;
constexpr int64_t kSteps = 4'000'000;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));

// Results go here, so that the compiler cannot drop the work.
std::atomic<uint64_t> sink;

// Best of several runs of body(thread) on all threads, in seconds.
template <class Body>
double best_seconds(int n_threads, const Body& body) {
  double best = 1e30;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto start = Clock::now();
    std::vector<std::jthread> helpers;
    for (int t = 1; t < n_threads; ++t) helpers.emplace_back([&body, t] { body(t); });
    body(0);
    helpers.clear();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

double read_bytes_per_s(int n_threads) {
  auto* data = static_cast<std::byte*>(std::aligned_alloc(4096, kReadBytes));
  if (data == nullptr) return 0;
  std::memset(data, 1, kReadBytes);
  const size_t share = kReadBytes / static_cast<size_t>(n_threads) / 4096 * 4096;
  const double seconds = best_seconds(n_threads, [&](int t) {
    const auto* from = reinterpret_cast<const Words*>(data + share * static_cast<size_t>(t));
    Words sums[4] = {};
    for (size_t i = 0; i + 4 <= share / sizeof(Words); i += 4) {
      for (size_t j = 0; j < 4; ++j) sums[j] ^= from[i + j];
    }
    sink += (sums[0] ^ sums[1] ^ sums[2] ^ sums[3])[0];
  });
  std::free(data);
  return static_cast<double>(share) * n_threads / seconds;
}

// kSums chains of step(sum) on every thread; returns steps per second.
template <class Sum, class Step>
double steps_per_s(int n_threads, const Step& step) {
  const double seconds = best_seconds(n_threads, [&](int t) {
    const Step local = step;  // its operand stays in a register
    Sum sums[kSums];
    for (int s = 0; s < kSums; ++s) sums[s] = Sum{} + static_cast<decltype(Sum{}[0])>(t);
    for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
      for (int s = 0; s < kSums; ++s) sums[s] = local(sums[s]);
    }
    Sum total = sums[0];
    for (int s = 1; s < kSums; ++s) total += sums[s];
    uint64_t word;
    std::memcpy(&word, &total, sizeof(word));
    sink += word;
  });
  return static_cast<double>(kSteps) * kSums * n_threads / seconds;
}

double fp32_flops(int n_threads) {
  volatile float from_outside = 0.5f;
  const Floats a = Floats{} + from_outside;
  const double rate = steps_per_s<Floats>(n_threads, [a](Floats sum) { return sum * a + a; });
  return rate * 2 * kVectorBytes / 4;
}

// 0: this build has no such instruction.
double int8_ops(int n_threads) {
#if defined(__AVX512VNNI__)
  volatile int from_outside = 0x01010101;
  const __m512i a = _mm512_set1_epi32(from_outside);
  const double rate =
      steps_per_s<__m512i>(n_threads, [a](__m512i sum) { return _mm512_dpbusd_epi32(sum, a, a); });
  return rate * 2 * 64;
#elif defined(__AVX2__)
  volatile int from_outside = 0x01010101;
  const __m256i a = _mm256_set1_epi32(from_outside);
  const __m256i ones = _mm256_set1_epi16(1);
  const double rate = steps_per_s<__m256i>(n_threads, [a, ones](__m256i sum) {
    const __m256i pairs = _mm256_maddubs_epi16(a, sum);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
  });
  return rate * 2 * 32;
#else
  (void)n_threads;
  return 0;
#endif
}

double bf16_flops(int n_threads) {
#if defined(__AVX512BF16__)
  volatile int from_outside = 0x3f803f80;
  const __m512i bits = _mm512_set1_epi32(from_outside);
  __m512bh a;
  std::memcpy(&a, &bits, sizeof(a));
  const double rate =
      steps_per_s<__m512>(n_threads, [a](__m512 sum) { return _mm512_dpbf16_ps(sum, a, a); });
  return rate * 2 * 32;
#else
  (void)n_threads;
  return 0;
#endif
}

}  // namespace

int main(int argc, char** argv) {
  const int n_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  if (n_threads < 1) return 2;
  std::printf(
      "{\"read_gb_s\": %.2f, \"fp32_gflop_s\": %.1f, \"int8_gop_s\": %.1f, "
      "\"bf16_gflop_s\": %.1f}\n",
      read_bytes_per_s(n_threads) / 1e9, fp32_flops(n_threads) / 1e9, int8_ops(n_threads) / 1e9,
      bf16_flops(n_threads) / 1e9);
  return 0;
}
