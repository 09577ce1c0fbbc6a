#include "sys/affinity.h"

#include <unistd.h>

#include <algorithm>

namespace mla::sys {

bool run_on(const std::vector<int>& cpus) {
  if (cpus.empty()) return false;
  const int n_cpus = *std::max_element(cpus.begin(), cpus.end()) + 1;
  cpu_set_t* set = CPU_ALLOC(n_cpus);
  if (set == nullptr) return false;
  const size_t set_bytes = CPU_ALLOC_SIZE(n_cpus);
  CPU_ZERO_S(set_bytes, set);
  for (int cpu : cpus) CPU_SET_S(cpu, set_bytes, set);
  const bool done = sched_setaffinity(0, set_bytes, set) == 0;
  CPU_FREE(set);
  return done;
}

RunOn::RunOn(const std::vector<int>& cpus) {
  if (cpus.empty()) return;
  const long n_cpus = std::max(sysconf(_SC_NPROCESSORS_CONF), long{CPU_SETSIZE});
  set_bytes_ = CPU_ALLOC_SIZE(n_cpus);
  before_.reset(CPU_ALLOC(n_cpus));
  if (before_ == nullptr || sched_getaffinity(0, set_bytes_, before_.get()) != 0) {
    before_ = nullptr;
    return;
  }
  const auto allowed = [&](int cpu) { return CPU_ISSET_S(cpu, set_bytes_, before_.get()) != 0; };
  const bool there = CPU_COUNT_S(set_bytes_, before_.get()) <= static_cast<int>(cpus.size()) &&
                     std::all_of(cpus.begin(), cpus.end(), allowed);
  if (there || !run_on(cpus)) before_ = nullptr;
}

RunOn::~RunOn() {
  if (before_ != nullptr) sched_setaffinity(0, set_bytes_, before_.get());
}

Affinity::Affinity() {
  const long n_cpus = std::max(sysconf(_SC_NPROCESSORS_CONF), long{CPU_SETSIZE});
  set_bytes_ = CPU_ALLOC_SIZE(n_cpus);
  cpus_.reset(CPU_ALLOC(n_cpus));
  if (cpus_ != nullptr && sched_getaffinity(0, set_bytes_, cpus_.get()) != 0) cpus_ = nullptr;
}

void Affinity::restore() const {
  if (cpus_ != nullptr) sched_setaffinity(0, set_bytes_, cpus_.get());
}

}  // namespace mla::sys
