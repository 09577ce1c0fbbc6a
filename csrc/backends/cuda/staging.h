// The way of weights from a mapped file to the device: pages are read into one of two pinned
// buffers while the other is on its way.
#pragma once

#include <array>
#include <functional>

#include "backends/cuda/runtime.h"

namespace mla::cuda {

class Staging {
 public:
  explicit Staging(Stream stream) : stream_(stream) {}

  // Calls use(piece on the device, its offset in src, its bytes) for consecutive pieces of src,
  // each a multiple of `unit` bytes but the last. What `use` enqueues may read the piece.
  using Use = std::function<void(const std::byte* piece, size_t offset, size_t bytes)>;
  void stream_pieces(const std::byte* src, size_t bytes, size_t unit, const Use& use);

  // The same bytes in device memory.
  void copy(std::byte* dst, const std::byte* src, size_t bytes);

 private:
  struct Slot {
    std::shared_ptr<std::byte> host, device;
    size_t host_bytes = 0, device_bytes = 0;
    Event used;
    bool busy = false;
  };
  // A pinned buffer with these bytes in it, free to be reused once slot.used has passed.
  Slot& fill(const std::byte* src, size_t bytes);

  Stream stream_;
  std::array<Slot, 2> slots_;
  size_t next_ = 0;
};

}  // namespace mla::cuda
