// What the executor asks of a device. One class per device; the planner never knows which.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string_view>

#include "graph/node.h"

namespace mla {

inline constexpr int kMaxInputs = 8;

// Owned memory of some backend. Host-addressable unless the backend says otherwise.
struct Buffer {
  std::shared_ptr<std::byte> data;
  size_t size_bytes = 0;
};

// Where memory should lie. node < 0: wherever the first touch puts it.
struct Placement {
  int node = -1;
};

// A node with every operand resolved to memory. in[i] has data == nullptr where the optional
// operand is absent.
struct Step {
  const Node* node = nullptr;
  Tensor out;
  std::array<Tensor, kMaxInputs> in;
};

// Called between steps, at least once per node, on the thread that called run. It throws
// (CancelledError, or what the caller likes) to stop; nothing is left half-locked.
using Checkpoint = std::function<void()>;

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string_view name() const = 0;
  // Pure: depends on the node's op, formats, shapes and strides alone.
  virtual bool supports_op(const Node& node) const = 0;
  // True where this backend's kernels may dereference host memory (weights, state) as it is.
  virtual bool shares_host_memory() const = 0;
  virtual size_t scratch_bytes(const Node& node) const = 0;
  virtual Buffer alloc(size_t bytes, Placement placement) = 0;
  // Between this backend's memory and the host, or within it; same shape and format, any strides.
  virtual void copy(const Tensor& dst, const Tensor& src) = 0;
  // Runs the steps in order. scratch holds the largest scratch_bytes of them.
  virtual void run(std::span<const Step> steps, const Buffer& scratch,
                   const Checkpoint& checkpoint) = 0;
  virtual void sync() = 0;
};

}  // namespace mla
