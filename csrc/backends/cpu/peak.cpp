// What the threads of a backend reach together on the probes of its ISA.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "base/error.h"
#include "sys/affinity.h"
#include "sys/numa_memory.h"

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

// As many chunks for each node as it has threads, times per_thread.
std::vector<int64_t> node_chunks(const sys::ThreadPool& pool, int64_t per_thread) {
  std::vector<int64_t> begins = {0};
  for (int64_t n_threads : pool.node_threads()) {
    begins.push_back(begins.back() + n_threads * per_thread);
  }
  return begins;
}

double measure_read(sys::ThreadPool& pool, const ProbeTable& probe, const sys::NodeMemory& buffer,
                    int n_repeats) {
  const std::vector<int64_t> begins = node_chunks(pool, kParts);
  const int64_t n_parts = pool.n_threads() * kParts;
  const int64_t part = buffer.size_bytes() / n_parts / kPartGranule * kPartGranule;
  // Written by those who will read: memory lies with whoever touches it first.
  pool.parallel_for(begins, [&](int64_t chunk, int) {
    std::memset(buffer.data() + chunk * part, 1, static_cast<size_t>(part));
  });
  std::atomic<uint32_t> sink = 0;
  const double seconds = best_seconds(n_repeats, [&] {
    pool.parallel_for(begins, [&](int64_t chunk, int) {
      sink += probe.read(buffer.data() + chunk * part, part);
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
    pool.parallel_for(node_chunks(pool, 1), [&](int64_t, int) { sink += probe.run(kSteps, seed); });
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
  const sys::RunOn at_its_node(pool_->caller_cpus());
  const sys::NodeMemory memory(static_cast<int64_t>(read_bytes), {}, sys::NodePolicy::bind);
  peak.read_bytes = measure_read(*pool_, probe, memory, n_repeats);
  peak.f32_ops = measure_multiply(*pool_, probe.f32, n_repeats);
  peak.int8_ops = measure_multiply(*pool_, probe.int8, n_repeats);
  peak.bf16_ops = measure_multiply(*pool_, probe.bf16, n_repeats);
  return peak;
}

}  // namespace mla::cpu
