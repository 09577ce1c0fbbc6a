// Limits that control groups, version 1 or 2, set to this process. A limit of any ancestor counts.
// `root` stands before /proc and /sys (tests give a made-up tree).
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace mla::sys {

// Bytes of memory that may still be taken: limit less use, page cache counted as free because it is
// given back on demand. Empty where no limit is set.
std::optional<int64_t> cgroup_free_bytes(const std::string& root);

// Processor time per time, in cores. Empty where no quota is set.
std::optional<double> cpu_quota_cores(const std::string& root);

}  // namespace mla::sys
