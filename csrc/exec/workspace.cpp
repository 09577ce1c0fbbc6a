#include "exec/workspace.h"

#include "base/error.h"

namespace mla {

Workspace::Workspace(std::vector<std::shared_ptr<Backend>> backends)
    : backends_(std::move(backends)), owner_{-1}, scratch_(backends_.size()) {
  for (size_t i = 0; i < backends_.size(); ++i) {
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

void Workspace::reserve(Domain domain, size_t arena_bytes) {
  Buffer& arena = arena_[static_cast<size_t>(domain)];
  if (arena.size_bytes >= arena_bytes) return;
  arena = {};  // release first: both need not exist at once
  arena = owner(domain).alloc(arena_bytes, {});
  ++generation_;
}

void Workspace::reserve_scratch(int backend, size_t bytes) {
  Buffer& scratch = scratch_[static_cast<size_t>(backend)];
  if (scratch.size_bytes >= bytes) return;
  scratch = {};
  scratch = backends_[static_cast<size_t>(backend)]->alloc(bytes, {});
  ++generation_;
}

Tensor Workspace::constant(Domain domain, const Tensor& host) {
  if (domain == kHost) return host;
  const Layout dense = Layout::contiguous(host.format, host.shape);
  Buffer& buffer = constants_[{domain, host.data, host.format, host.shape.extent, host.stride}];
  if (buffer.data == nullptr) {
    buffer = owner(domain).alloc(static_cast<size_t>(dense.span_bytes()), {});
    owner(domain).copy(Tensor(dense, buffer.data.get()), host);
  }
  return Tensor(dense, buffer.data.get());
}

}  // namespace mla
