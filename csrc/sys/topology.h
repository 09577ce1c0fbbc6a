// What of the processors this process may use.
#pragma once

#include <string>
#include <vector>

namespace mla::sys {

// Logical CPUs in this process's affinity mask, ascending.
std::vector<int> usable_cpus();

// Physical cores among usable_cpus(): hardware threads of one core count once, because two threads
// on one core share its vector units and memory ports. No more than the cgroup's CPU quota, rounded
// up; at least 1. `root` stands before /proc and /sys (tests give a made-up tree).
int usable_physical_cores(const std::string& root = "");

}  // namespace mla::sys
