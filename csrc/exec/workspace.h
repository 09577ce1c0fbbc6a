// The memory that all executors of one model share: per memory domain one arena for intermediates
// and one scratch block, plus constants that had to be copied to a device.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "exec/backend.h"

namespace mla {

// Domain 0 is host memory; every backend that cannot use it directly has a domain of its own.
using Domain = int;
inline constexpr Domain kHost = 0;

class Workspace {
 public:
  // `backends` in order of preference. At least one must share host memory; throws
  // UnsupportedError.
  explicit Workspace(std::vector<std::shared_ptr<Backend>> backends);

  const std::vector<std::shared_ptr<Backend>>& backends() const { return backends_; }
  int n_domains() const { return static_cast<int>(owner_.size()); }
  Domain domain_of(int backend) const { return domain_[static_cast<size_t>(backend)]; }
  // The backend that allocates in a domain and copies to and from it.
  Backend& owner(Domain domain) const {
    return *backends_[static_cast<size_t>(owner_[static_cast<size_t>(domain)])];
  }

  // Grow to at least these sizes; executors notice by generation() and bind anew.
  void reserve(Domain domain, size_t arena_bytes);
  void reserve_scratch(int backend, size_t bytes);
  const Buffer& arena(Domain domain) const { return arena_[static_cast<size_t>(domain)]; }
  const Buffer& scratch(int backend) const { return scratch_[static_cast<size_t>(backend)]; }
  uint64_t generation() const { return generation_; }

  // `host` copied into `domain`, once for all executors. Weights only: the copy never changes.
  Tensor constant(Domain domain, const Tensor& host);

 private:
  std::vector<std::shared_ptr<Backend>> backends_;
  std::vector<Domain> domain_;  // by backend
  std::vector<int> owner_;      // by domain
  std::vector<Buffer> arena_;
  std::vector<Buffer> scratch_;
  using Extents = std::array<int64_t, kMaxRank>;
  std::map<std::tuple<Domain, const std::byte*, Format, Extents, Extents>, Buffer> constants_;
  uint64_t generation_ = 0;
};

}  // namespace mla
