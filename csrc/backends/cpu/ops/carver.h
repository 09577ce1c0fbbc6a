// Laying out an op's scratch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mla::cpu {

// Hands out 64-byte aligned parts of the scratch. Over a null base it only measures, so the same
// code lays out and sizes an op's scratch.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  T* take(int64_t n) {
    std::byte* p = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  size_t used_bytes() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

}  // namespace mla::cpu
