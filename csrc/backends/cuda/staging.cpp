#include "backends/cuda/staging.h"

#include <algorithm>
#include <cstring>

namespace mla::cuda {
namespace {

// Copies of this size run at the bus's full rate; twice that is what an upload holds.
constexpr size_t kPieceBytes = size_t{32} << 20;

}  // namespace

Staging::Slot& Staging::fill(const std::byte* src, size_t bytes) {
  Slot& slot = slots_[next_];
  next_ = (next_ + 1) % slots_.size();
  if (slot.busy) slot.used.sync();
  if (slot.host_bytes < bytes) {
    slot.host = pinned_buffer(bytes);
    slot.host_bytes = bytes;
  }
  std::memcpy(slot.host.get(), src, bytes);
  slot.busy = true;
  return slot;
}

void Staging::stream_pieces(const std::byte* src, size_t bytes, size_t unit, const Use& use) {
  const size_t step = std::max(kPieceBytes / unit, size_t{1}) * unit;
  for (size_t at = 0; at < bytes; at += step) {
    const size_t n_bytes = std::min(step, bytes - at);
    Slot& slot = fill(src + at, n_bytes);
    if (slot.device_bytes < n_bytes) {
      slot.device = device_buffer(n_bytes);
      slot.device_bytes = n_bytes;
    }
    copy_async(slot.device.get(), slot.host.get(), n_bytes, stream_);
    use(slot.device.get(), at, n_bytes);
    slot.used.record(stream_);
  }
}

void Staging::copy(std::byte* dst, const std::byte* src, size_t bytes) {
  for (size_t at = 0; at < bytes; at += kPieceBytes) {
    const size_t n_bytes = std::min(kPieceBytes, bytes - at);
    Slot& slot = fill(src + at, n_bytes);
    copy_async(dst + at, slot.host.get(), n_bytes, stream_);
    slot.used.record(stream_);
  }
}

}  // namespace mla::cuda
