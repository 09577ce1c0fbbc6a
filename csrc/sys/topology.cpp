#include "sys/topology.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>

#include "base/error.h"
#include "sys/cgroup.h"

namespace mla::sys {

std::vector<int> usable_cpus() {
  // The kernel refuses a mask shorter than its own, whose length it does not tell.
  for (int n_cpus = 1024; n_cpus <= (1 << 20); n_cpus *= 2) {
    cpu_set_t* mask = CPU_ALLOC(n_cpus);
    if (mask == nullptr) break;
    const size_t mask_bytes = CPU_ALLOC_SIZE(n_cpus);
    CPU_ZERO_S(mask_bytes, mask);
    const bool known = sched_getaffinity(0, mask_bytes, mask) == 0;
    std::vector<int> cpus;
    for (int cpu = 0; known && cpu < n_cpus; ++cpu) {
      if (CPU_ISSET_S(cpu, mask_bytes, mask)) cpus.push_back(cpu);
    }
    CPU_FREE(mask);
    if (known) return cpus;
  }
  std::vector<int> all(static_cast<size_t>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN))));
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i);
  return all;
}

int usable_physical_cores(const std::string& root) {
  std::set<std::string> cores;
  for (int cpu : usable_cpus()) {
    // The list of a core's hardware threads names the core; without it each CPU counts as one.
    std::ifstream file(
        concat(root, "/sys/devices/system/cpu/cpu", cpu, "/topology/thread_siblings_list"));
    std::string siblings;
    if (!(file >> siblings)) siblings = concat("cpu", cpu);
    cores.insert(siblings);
  }
  int n_cores = std::max<int>(1, static_cast<int>(cores.size()));
  if (const auto quota = cpu_quota_cores(root)) {
    n_cores = std::clamp(static_cast<int>(std::ceil(*quota)), 1, n_cores);
  }
  return n_cores;
}

}  // namespace mla::sys
