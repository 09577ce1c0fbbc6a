// The memory that all executors of one model share: per memory domain one arena for intermediates
// and one scratch block, plus constants that had to be copied to a device.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "exec/backend.h"
#include "exec/order.h"

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

  // The right to change or use the memory: one executor at a time. Throws DeviceError where another
  // has it, be it in another thread or further up in this one; waiting could wait for itself.
  class Turn {
   public:
    explicit Turn(Workspace& workspace);
    ~Turn() { busy_.clear(std::memory_order_release); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    std::atomic_flag& busy_;
  };

  // Grow to at least these sizes; executors notice by generation() and bind anew. Where memory is
  // short, what there was is gone too, and MemoryLimitError is thrown.
  void reserve(Domain domain, size_t arena_bytes);
  void reserve_scratch(int backend, size_t bytes);
  const Buffer& arena(Domain domain) const { return arena_[static_cast<size_t>(domain)]; }
  const Buffer& scratch(int backend) const { return scratch_[static_cast<size_t>(backend)]; }
  uint64_t generation() const { return generation_; }
  // Of the executors' work, which may go on after the turn that began it.
  Order& order() { return order_; }

  // Whose values the arenas hold: a new number for each run and each new arena.
  uint64_t next_values() { return ++values_; }
  uint64_t values() const { return values_; }

  // What the owner of `domain` made of constant host memory. Executors, and whoever else asked,
  // share it and keep it alive: it goes with the last of them, because then the host memory may go
  // as well and other weights take its place.
  Buffer constant(Domain domain, const Tensor& host);

  // Where memory of this home (see Node::home) lies; throws UnsupportedError where it is foreign.
  Domain domain_of_home(const void* home) const;

 private:
  std::vector<std::shared_ptr<Backend>> backends_;
  std::vector<Domain> domain_;  // by backend
  std::vector<int> owner_;      // by domain
  Order order_;
  std::vector<Buffer> arena_;
  std::vector<Buffer> scratch_;
  using Extents = std::array<int64_t, kMaxRank>;
  using Key = std::tuple<Domain, const std::byte*, Format, Extents, Extents>;
  struct Constant {
    std::weak_ptr<std::byte> data;
    size_t size_bytes;
  };
  std::map<Key, Constant> constants_;
  std::atomic_flag busy_;
  uint64_t generation_ = 0;
  uint64_t values_ = 0;
};

}  // namespace mla
