// Pieces of a node's scratch memory, each aligned to 256 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mla::cuda {

// From null it only counts.
class Room {
 public:
  explicit Room(std::byte* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    const size_t at = used_bytes_;
    used_bytes_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + at);
  }
  size_t used_bytes() const { return used_bytes_; }

 private:
  std::byte* memory_;
  size_t used_bytes_ = 0;
};

}  // namespace mla::cuda
