#include "exec/workspace.h"

#include <algorithm>

#include "base/error.h"

namespace mla {

Workspace::Workspace(std::vector<std::shared_ptr<Backend>> backends)
    : backends_(std::move(backends)),
      owner_{-1},
      order_(backends_, static_cast<int>(backends_.size()) + 1),
      scratch_(backends_.size()) {
  for (size_t i = 0; i < backends_.size(); ++i) {
    MLA_CHECK(UnsupportedError, backends_[i] != nullptr, "workspace: backend ", i, " is none");
    if (backends_[i]->shares_host_memory()) {
      domain_.push_back(kHost);
      if (owner_[kHost] < 0) owner_[kHost] = static_cast<int>(i);
    } else {
      domain_.push_back(static_cast<Domain>(owner_.size()));
      owner_.push_back(static_cast<int>(i));
    }
  }
  MLA_CHECK(UnsupportedError, owner_[kHost] >= 0,
            "workspace: no backend uses host memory; add the CPU backend");
  arena_.resize(owner_.size());
}

Workspace::Turn::Turn(Workspace& workspace) : busy_(workspace.busy_) {
  MLA_CHECK(DeviceError, !busy_.test_and_set(std::memory_order_acquire),
            "workspace: another executor is running in it");
}

void Workspace::reserve(Domain domain, size_t arena_bytes) {
  Buffer& arena = arena_[static_cast<size_t>(domain)];
  // Never nothing: a null pointer means an operand that is absent, not one that is empty.
  const size_t wanted = std::max<size_t>(arena_bytes, 1);
  if (arena.size_bytes >= wanted) return;
  ++generation_;
  next_values();
  arena = {};  // release first: both need not exist at once
  if (domain == kHost) {
    for (const auto& backend : backends_) {
      if (arena.size_bytes == 0) arena = backend->alloc_host(wanted);
    }
  }
  if (arena.size_bytes == 0) arena = owner(domain).alloc(wanted, {});
}

void Workspace::reserve_scratch(int backend, size_t bytes) {
  Buffer& scratch = scratch_[static_cast<size_t>(backend)];
  if (scratch.size_bytes >= bytes) return;
  ++generation_;
  scratch = {};
  scratch = backends_[static_cast<size_t>(backend)]->alloc(bytes, {});
}

Buffer Workspace::constant(Domain domain, const Tensor& host) {
  const Key key = {domain, host.data, host.format, host.shape.extent, host.stride};
  if (const auto found = constants_.find(key); found != constants_.end()) {
    if (auto alive = found->second.data.lock()) return {alive, found->second.size_bytes};
  }
  std::erase_if(constants_, [](const auto& entry) { return entry.second.data.expired(); });
  Buffer buffer = owner(domain).upload(host);
  constants_[key] = {buffer.data, buffer.size_bytes};
  return buffer;
}

Domain Workspace::domain_of_home(const void* home) const {
  if (home == nullptr) return kHost;
  for (size_t i = 0; i < backends_.size(); ++i) {
    if (backends_[i].get() == home) return domain_[i];
  }
  throw UnsupportedError("workspace: a state lies in the memory of a backend that is not here");
}

}  // namespace mla
