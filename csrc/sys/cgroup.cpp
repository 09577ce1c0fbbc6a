#include "sys/cgroup.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <vector>

namespace mla::sys {
namespace {

// Where one hierarchy is mounted, and which part of it the mount shows.
struct Mount {
  std::string shown;  // the group at the mount point, "/" outside containers
  std::string point;
  bool v2;
};

// Version 1 file names per controller; version 2 has all controllers in one hierarchy.
struct MemoryFiles {
  const char* limit;
  const char* used;
  const char* active_file;  // keys of memory.stat
  const char* inactive_file;
};
constexpr MemoryFiles kMemoryV1 = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                                   "total_active_file", "total_inactive_file"};
constexpr MemoryFiles kMemoryV2 = {"memory.max", "memory.current", "active_file", "inactive_file"};

bool has_item(const std::string& list, const std::string& item) {
  std::istringstream items(list);
  for (std::string name; std::getline(items, name, ',');) {
    if (name == item) return true;
  }
  return false;
}

// Mounts of a controller's hierarchies. A line of mountinfo: id parent device shown point options
// [tags...] - type source super-options.
std::vector<Mount> find_mounts(const std::string& root, const std::string& controller) {
  std::vector<Mount> mounts;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string id, parent, device, shown, point, word, type, source, super_options;
    fields >> id >> parent >> device >> shown >> point;
    while (fields >> word && word != "-") {
    }
    fields >> type >> source >> super_options;
    if (type == "cgroup2" || (type == "cgroup" && has_item(super_options, controller))) {
      mounts.push_back({shown, root + point, type == "cgroup2"});
    }
  }
  return mounts;
}

// This process's group in a hierarchy. A line of /proc/self/cgroup: id:controllers:path, with id 0
// and no controllers for version 2.
std::string own_group(const std::string& root, const std::string& controller, bool v2) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first == std::string::npos ? first : first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (v2 ? controllers.empty() : has_item(controllers, controller)) {
      return line.substr(second + 1);
    }
  }
  return "/";
}

// Directories of this process's group and of all its ancestors that the mount shows.
std::vector<std::string> group_dirs(const std::string& root, const std::string& controller,
                                    const Mount& mount) {
  std::string path = own_group(root, controller, mount.v2);
  // In a container the mount may show a part of the tree only, and the path begins above it.
  if (mount.shown != "/" && path.starts_with(mount.shown)) path.erase(0, mount.shown.size());
  std::vector<std::string> dirs;
  while (!path.empty() && path != "/") {
    dirs.push_back(mount.point + path);
    path.erase(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
  }
  dirs.push_back(mount.point);
  return dirs;
}

// The number at the start of a file; empty for "max", "-1" and missing files.
std::optional<int64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (!(file >> value) || value < 0) return std::nullopt;
  return value;
}

int64_t read_stat(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  int64_t value = 0;
  while (file >> name >> value) {
    if (name == key) return value;
  }
  return 0;
}

}  // namespace

std::optional<int64_t> cgroup_free_bytes(const std::string& root) {
  std::optional<int64_t> least;
  for (const Mount& mount : find_mounts(root, "memory")) {
    const MemoryFiles& names = mount.v2 ? kMemoryV2 : kMemoryV1;
    for (const std::string& dir : group_dirs(root, "memory", mount)) {
      const auto limit = read_number(dir + "/" + names.limit);
      const auto used = read_number(dir + "/" + names.used);
      if (!limit || !used) continue;
      const std::string stat = dir + "/memory.stat";
      const int64_t cached =
          read_stat(stat, names.active_file) + read_stat(stat, names.inactive_file);
      const int64_t free = std::max<int64_t>(0, *limit - std::max<int64_t>(0, *used - cached));
      least = least ? std::min(*least, free) : free;
    }
  }
  return least;
}

std::optional<double> cpu_quota_cores(const std::string& root) {
  std::optional<double> least;
  for (const Mount& mount : find_mounts(root, "cpu")) {
    for (const std::string& dir : group_dirs(root, "cpu", mount)) {
      double quota = 0;
      double period = 0;
      if (mount.v2) {
        std::ifstream file(dir + "/cpu.max");  // "max 100000" fails to parse: no quota
        if (!(file >> quota >> period)) continue;
      } else {
        quota = static_cast<double>(read_number(dir + "/cpu.cfs_quota_us").value_or(0));
        period = static_cast<double>(read_number(dir + "/cpu.cfs_period_us").value_or(0));
      }
      if (quota <= 0 || period <= 0) continue;
      least = least ? std::min(*least, quota / period) : quota / period;
    }
  }
  return least;
}

}  // namespace mla::sys
