// What of the processors and of their memory this process may use.
//
// Everything is read from /proc and /sys below `root` (tests give a made-up tree; "" is this
// machine). The affinity mask and the cpuset's memory nodes are those that the kernel states for
// the calling thread, so that taskset, numactl and containers are all obeyed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mla::sys {

// Logical CPUs in this process's affinity mask, ascending.
std::vector<int> usable_cpus();

// Physical cores among usable_cpus(): hardware threads of one core count once, because two threads
// on one core share its vector units and memory ports. No more than the cgroup's CPU quota, rounded
// up; at least 1.
int usable_physical_cores(const std::string& root = "");

// Where one logical CPU is. Numbers that the kernel does not tell are -1.
struct CpuPlace {
  int cpu;
  int core;     // the lowest CPU of its hardware threads
  int package;  // socket
  int l3;       // the lowest CPU of those that share its last-level cache
};

// Memory, and the CPUs next to it. Either may be missing.
struct NumaNode {
  int id;
  std::vector<CpuPlace> cpus;  // those that are online
  std::vector<int> usable;     // of them, those of the affinity mask, ascending
  int64_t total_bytes;
  int64_t free_bytes;         // page cache counted as free: it is given back on demand
  bool may_allocate;          // the cpuset and a binding policy let this process take memory here
  std::vector<int> distance;  // to each of Topology::nodes, 10 to itself; empty where unknown
};

// What set_mempolicy(2) was told for this thread, by numactl for example.
struct MemoryPolicy {
  std::string mode;        // "default", "preferred", "bind", "interleave", ...; "unknown": refused
  std::vector<int> nodes;  // empty where the mode has none
};

struct Topology {
  std::vector<NumaNode> nodes;  // ascending by id; empty where the kernel shows none
  MemoryPolicy policy;
};

// `policy` stands for the thread's own, so that tests can say what it would be; with a root and
// none given it is "default".
Topology read_topology(const std::string& root = "", const MemoryPolicy* policy = nullptr);

// "0-3,8" as numbers, ascending. Anything else ends the list.
std::vector<int> parse_list(const std::string& text);

}  // namespace mla::sys
