#include "sys/topology.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <optional>
#include <set>
#include <sstream>

#include "base/error.h"
#include "sys/cgroup.h"

namespace mla::sys {
namespace {

// Modes of set_mempolicy(2), by number; libnuma's header would be a dependency for ten words.
constexpr std::array<const char*, 7> kModes = {
    "default", "preferred", "bind", "interleave", "local", "preferred-many", "weighted-interleave"};
constexpr int kModeBind = 2;
// More nodes than any kernel is built for: it refuses masks shorter than its own.
constexpr unsigned long kMaxNodes = 4096;

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// The list behind "Name:" in /proc/thread-self/status; empty where it is not told.
std::optional<std::vector<int>> allowed_list(const std::string& root, const std::string& name) {
  std::ifstream file(root + "/proc/thread-self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(name + ":")) return parse_list(line.substr(name.size() + 1));
  }
  return std::nullopt;
}

int lowest(const std::string& path, int otherwise) {
  const std::vector<int> numbers = parse_list(first_line(path));
  return numbers.empty() ? otherwise : numbers.front();
}

CpuPlace place_of(const std::string& root, int cpu) {
  const std::string dir = concat(root, "/sys/devices/system/cpu/cpu", cpu);
  int package = -1;
  std::ifstream(dir + "/topology/physical_package_id") >> package;
  return {cpu, lowest(dir + "/topology/thread_siblings_list", cpu), package,
          lowest(dir + "/cache/index3/shared_cpu_list", -1)};
}

// Lines of a node's meminfo: "Node 0 MemFree:  123 kB".
void read_memory(const std::string& path, NumaNode& node) {
  std::ifstream file(path);
  std::string word, number, name;
  int64_t kb = 0;
  while (file >> word >> number >> name >> kb) {
    if (name == "MemTotal:") node.total_bytes = kb * 1024;
    const bool free = name == "MemFree:" || name == "Active(file):" || name == "Inactive(file):" ||
                      name == "SReclaimable:";
    if (free) node.free_bytes += kb * 1024;
    file.ignore(LLONG_MAX, '\n');
  }
}

std::vector<int> node_ids(const std::string& top) {
  std::vector<int> ids;
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator(top, none)) {
    const std::string name = entry.path().filename();
    if (!name.starts_with("node") || name.size() == 4) continue;
    if (std::all_of(name.begin() + 4, name.end(), [](char c) { return c >= '0' && c <= '9'; })) {
      ids.push_back(std::stoi(name.substr(4)));
    }
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

bool contains(const std::vector<int>& numbers, int number) {
  return std::find(numbers.begin(), numbers.end(), number) != numbers.end();
}

MemoryPolicy own_policy() {
  constexpr size_t kBits = sizeof(unsigned long) * CHAR_BIT;
  std::array<unsigned long, kMaxNodes / kBits> mask = {};
  int mode = 0;
  // Containers may forbid the question, and kernels without nodes do not know it.
  if (syscall(SYS_get_mempolicy, &mode, mask.data(), kMaxNodes, nullptr, 0UL) != 0) {
    return {"unknown", {}};
  }
  mode &= 0xff;  // flags are above
  MemoryPolicy policy = {static_cast<size_t>(mode) < kModes.size() ? kModes[mode] : "unknown", {}};
  for (size_t node = 0; node < kMaxNodes; ++node) {
    if (mask[node / kBits] >> (node % kBits) & 1) policy.nodes.push_back(static_cast<int>(node));
  }
  return policy;
}

}  // namespace

std::vector<int> parse_list(const std::string& text) {
  std::vector<int> numbers;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    std::istringstream range(part);
    int first = 0;
    int last = 0;
    char dash = 0;
    if (!(range >> first)) break;
    if (!(range >> dash >> last) || dash != '-') last = first;
    for (int i = first; i <= last; ++i) numbers.push_back(i);
  }
  return numbers;
}

Topology read_topology(const std::string& root, const MemoryPolicy* policy) {
  const std::string top = root + "/sys/devices/system/node";
  Topology found = {{}, {kModes[0], {}}};
  if (policy != nullptr) {
    found.policy = *policy;
  } else if (root.empty()) {
    found.policy = own_policy();
  }
  const bool bound = found.policy.mode == kModes[kModeBind];
  const auto allowed_cpus = allowed_list(root, "Cpus_allowed_list");
  const auto allowed_nodes = allowed_list(root, "Mems_allowed_list");
  const std::vector<int> ids = node_ids(top);
  for (const int id : ids) {
    const std::string dir = concat(top, "/node", id);
    NumaNode node = {id, {}, {}, 0, 0, true, {}};
    for (const int cpu : parse_list(first_line(dir + "/cpulist"))) {
      node.cpus.push_back(place_of(root, cpu));
      if (!allowed_cpus || contains(*allowed_cpus, cpu)) node.usable.push_back(cpu);
    }
    read_memory(dir + "/meminfo", node);
    node.may_allocate = node.total_bytes > 0 && (!allowed_nodes || contains(*allowed_nodes, id)) &&
                        (!bound || contains(found.policy.nodes, id));
    std::istringstream distances(first_line(dir + "/distance"));
    for (int distance; distances >> distance;) node.distance.push_back(distance);
    if (node.distance.size() != ids.size()) node.distance.clear();
    found.nodes.push_back(std::move(node));
  }
  return found;
}

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
