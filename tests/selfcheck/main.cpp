// Checks every kernel of every ISA that this machine can run against float64. Needs no Python, so
// that it also runs where there is none: under an emulator, under sanitizers.
#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/isa.h"
#include "base/error.h"
#include "check.h"

namespace {

// More threads than a small machine has cores: splits are then never trivial.
constexpr int kThreads = 3;

selfcheck::Machine make_machine(std::string_view isa) {
  mla::sys::ThreadPoolOptions options;
  options.n_threads = kThreads;
  auto pool = std::make_shared<mla::sys::ThreadPool>(options);
  std::vector<std::shared_ptr<mla::Backend>> backends = {
      std::make_shared<mla::cpu::CpuBackend>(std::move(pool), isa)};
  return {std::string(isa), std::make_shared<mla::Workspace>(std::move(backends))};
}

int run() {
  selfcheck::Report report;
  selfcheck::check_pool(report);
  for (std::string_view isa : mla::cpu::available_isas()) {
    const selfcheck::Machine machine = make_machine(isa);
    selfcheck::check_rows(machine, report);
    selfcheck::check_products(machine, report);
    selfcheck::check_attention(machine, report);
    selfcheck::check_nodes(std::string(isa), report);
  }
  std::printf("%d checks, %d failed\n", report.n_checks(), report.n_failed());
  return report.n_failed() == 0 ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const mla::Error& error) {
    std::fprintf(stderr, "selfcheck: %s\n", error.what());
    return 1;
  }
}
