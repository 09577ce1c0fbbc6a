#include "emulator/copies.h"

#include <cstring>

namespace mla::emulator {

void Copies::add(void* to, const void* from, size_t bytes) {
  pending_.push_back({to, from, bytes});
  ++n_open_;
}

void Copies::commit() {
  groups_.push_back(n_open_);
  n_open_ = 0;
}

void Copies::wait(size_t n_groups_left) {
  size_t n_done = 0, n_groups = 0;
  while (groups_.size() - n_groups > n_groups_left) n_done += groups_[n_groups++];
  for (size_t i = 0; i < n_done; ++i) {
    const Copy& copy = pending_[i];
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, copy.bytes);
    } else {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
  groups_.erase(groups_.begin(), groups_.begin() + static_cast<ptrdiff_t>(n_groups));
  pending_.erase(pending_.begin(), pending_.begin() + static_cast<ptrdiff_t>(n_done));
}

void Copies::clear() {
  pending_.clear();
  groups_.clear();
  n_open_ = 0;
}

}  // namespace mla::emulator
