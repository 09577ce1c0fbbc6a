// What the threads of a backend reach together on the probes of its ISA.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>

#include "backends/cpu/cpu_backend.h"
#include "base/error.h"

namespace mla::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// About 2 ms at two instructions per cycle: beyond what waking the threads takes.
constexpr int64_t kSteps = 1'000'000;
// Parts per thread: a thread that was held up leaves its parts to the others.
constexpr int64_t kParts = 16;
constexpr int64_t kPartGranule = 4096;

template <class Body>
double best_seconds(int n_repeats, const Body& body) {
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < n_repeats; ++i) {
    const auto start = Clock::now();
    body();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

double measure_read(sys::ThreadPool& pool, const ProbeTable& probe, const Buffer& buffer,
                    int n_repeats) {
  const int64_t n_parts = pool.n_threads() * kParts;
  const int64_t part =
      static_cast<int64_t>(buffer.size_bytes) / n_parts / kPartGranule * kPartGranule;
  // Written by those who will read: memory lies with whoever touches it first.
  pool.parallel_for(n_parts, [&](int64_t chunk, int) {
    std::memset(buffer.data.get() + chunk * part, 1, static_cast<size_t>(part));
  });
  std::atomic<uint32_t> sink = 0;
  const double seconds = best_seconds(n_repeats, [&] {
    pool.parallel_for(n_parts, [&](int64_t chunk, int) {
      sink += probe.read(buffer.data.get() + chunk * part, part);
    });
  });
  return static_cast<double>(part * n_parts) / seconds;
}

double measure_multiply(sys::ThreadPool& pool, const MultiplyProbe& probe, int n_repeats) {
  if (probe.run == nullptr) return 0;
  const int64_t n_parts = pool.n_threads();
  std::atomic<uint32_t> sink = 0;
  const volatile uint32_t seed = 0;
  const double seconds = best_seconds(n_repeats, [&] {
    pool.parallel_for(n_parts, [&](int64_t, int) { sink += probe.run(kSteps, seed); });
  });
  return static_cast<double>(kSteps * probe.n_ops * n_parts) / seconds;
}

}  // namespace

Peak CpuBackend::measure_peak(size_t read_bytes, int n_repeats) {
  const auto least = static_cast<size_t>(pool_->n_threads() * kParts * kPartGranule);
  MLA_CHECK(UnsupportedError, n_repeats >= 1 && read_bytes >= least, "measure_peak: ", n_repeats,
            " repeats over ", read_bytes, " bytes; accepted are 1 and ", least, " or more");
  const ProbeTable& probe = *kernels_.probe;
  Peak peak;
  peak.read_bytes = measure_read(*pool_, probe, alloc(read_bytes, {}), n_repeats);
  peak.f32_ops = measure_multiply(*pool_, probe.f32, n_repeats);
  peak.int8_ops = measure_multiply(*pool_, probe.int8, n_repeats);
  peak.bf16_ops = measure_multiply(*pool_, probe.bf16, n_repeats);
  return peak;
}

}  // namespace mla::cpu
