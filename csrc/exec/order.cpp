#include "exec/order.h"

#include <algorithm>

namespace mla {

Order::Order(std::span<const std::shared_ptr<Backend>> backends, int n_domains)
    : backends_(backends.begin(), backends.end()),
      last_(static_cast<size_t>(n_domains), std::vector<Last>(backends_.size())),
      pool_(backends_.size()),
      busy_(backends_.size()) {}

void Order::enter(int backend, std::span<const Use> uses) {
  const auto self = static_cast<size_t>(backend);
  busy_[self] = true;
  for (const Use& use : uses) {
    const auto& others = last_[static_cast<size_t>(use.domain)];
    for (size_t i = 0; i < others.size(); ++i) {
      if (i == self) continue;
      if (others[i].write != nullptr) backends_[self]->follow(*others[i].write);
      if (use.writes && others[i].read != nullptr) backends_[self]->follow(*others[i].read);
    }
  }
}

void Order::leave(int backend, std::span<const Use> uses) {
  const auto self = static_cast<size_t>(backend);
  const std::shared_ptr<Mark> mark = free_mark(self);
  if (mark == nullptr) {
    backends_[self]->sync();
    busy_[self] = false;
    return;
  }
  mark->set();
  for (const Use& use : uses) {
    Last& last = last_[static_cast<size_t>(use.domain)][self];
    (use.writes ? last.write : last.read) = mark;
  }
}

void Order::wait(int domain) {
  for (Last& last : last_[static_cast<size_t>(domain)]) {
    for (std::shared_ptr<Mark>* mark : {&last.read, &last.write}) {
      if (*mark != nullptr) (*mark)->wait();
      *mark = nullptr;
    }
  }
}

void Order::settle() {
  for (size_t i = 0; i < backends_.size(); ++i) {
    if (!busy_[i]) continue;
    backends_[i]->sync();
    busy_[i] = false;
    for (auto& domain : last_) domain[i] = {};
  }
}

// One that no domain holds; there are never more than twice the domains and one.
std::shared_ptr<Mark> Order::free_mark(size_t backend) {
  auto& pool = pool_[backend];
  const auto found =
      std::ranges::find_if(pool, [](const auto& mark) { return mark.use_count() == 1; });
  if (found != pool.end()) return *found;
  std::shared_ptr<Mark> made = backends_[backend]->make_mark();
  if (made != nullptr) pool.push_back(made);
  return made;
}

}  // namespace mla
