// What a backend does unless it knows better.
#include "exec/backend.h"

#include <algorithm>
#include <cstring>

namespace mla {
namespace {

class PlainProgram final : public Program {
 public:
  PlainProgram(Backend& backend, std::span<const Step> steps, Buffer scratch)
      : backend_(backend), steps_(steps), scratch_(std::move(scratch)) {}
  void run(const Checkpoint& checkpoint) override { backend_.run(steps_, scratch_, checkpoint); }

 private:
  Backend& backend_;
  std::span<const Step> steps_;
  Buffer scratch_;
};

}  // namespace

void Backend::zero(const Buffer& buffer) { std::memset(buffer.data.get(), 0, buffer.size_bytes); }

Buffer Backend::upload(const Tensor& host) {
  const auto n_bytes = static_cast<size_t>(std::max<int64_t>(host.span_bytes(), 1));
  Buffer buffer = alloc(n_bytes, {});
  Tensor once = host;  // what a stride of 0 repeats is there once
  for (size_t i = 0; i < kMaxRank; ++i) {
    if (once.stride[i] == 0) once.shape.extent[i] = std::min<int64_t>(once.shape.extent[i], 1);
  }
  copy(Tensor(once, buffer.data.get() - host.low_bytes()), once);
  return buffer;
}

Tensor Backend::constant_view(const Buffer& uploaded, const Layout& whole, const Layout& view,
                              int64_t offset_bytes) const {
  return Tensor(view, uploaded.data.get() - whole.low_bytes() + offset_bytes);
}

std::unique_ptr<Program> Backend::compile(std::span<const Step> steps, const Buffer& scratch) {
  return std::make_unique<PlainProgram>(*this, steps, scratch);
}

}  // namespace mla
