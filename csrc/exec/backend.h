// What the executor asks of a device. One class per device; the planner never knows which.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

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
// operand is absent. Without a node: in[0] is copied to out, one of them in host memory.
struct Step {
  const Node* node = nullptr;
  Tensor out;
  std::array<Tensor, kMaxInputs> in;
  int n_readers = -1;  // steps and outputs that need its result, wherever they run; -1: not known
};

// Called between steps, at least once per node, on the thread that called run. It throws
// (CancelledError, or what the caller likes) to stop; nothing is left half-locked.
class Checkpoint {
 public:
  // n_steps: where steps are counted that have been computed; a device that works on its own time
  // counts none.
  template <std::invocable Look>
  Checkpoint(Look look, int64_t* n_steps = nullptr) : look_(std::move(look)), n_steps_(n_steps) {}
  void operator()() const { look_(); }
  void count_step() const {
    if (n_steps_ != nullptr) ++*n_steps_;
  }

 private:
  std::function<void()> look_;
  int64_t* n_steps_;
};

// A point in the work that a backend has been given, which others may wait for.
class Mark {
 public:
  virtual ~Mark() = default;
  virtual void set() = 0;         // behind all that the backend has been given so far
  virtual void wait() const = 0;  // on the host
};

// Steps made ready to run again and again, on the same memory.
class Program {
 public:
  virtual ~Program() = default;
  virtual void run(const Checkpoint& checkpoint) = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string_view name() const = 0;
  // Pure: depends on the node's op, formats, shapes and strides alone.
  virtual bool supports_op(const Node& node) const = 0;
  // Why not, where supports_op says no.
  virtual std::string refusal(const Node&) const { return "no kernel"; }
  // True where this backend's kernels may dereference host memory (weights, state) as it is.
  virtual bool shares_host_memory() const = 0;
  virtual size_t scratch_bytes(const Node& node) const = 0;
  virtual Buffer alloc(size_t bytes, Placement placement) = 0;
  virtual void zero(const Buffer& buffer);
  virtual size_t free_bytes() const { return 0; }  // of memory of its own
  // Host memory that copies to and from this backend are fastest with; empty: any.
  virtual Buffer alloc_host(size_t) { return {}; }
  // Between this backend's memory and the host, within it, or from the memory of one that it
  // reaches; same shape and format, any strides.
  virtual void copy(const Tensor& dst, const Tensor& src) = 0;
  // A copy of constant host memory, laid out as this backend's kernels like it. As it is unless
  // overridden.
  virtual Buffer upload(const Tensor& host);
  // Of what upload() made of a tensor laid out as `whole`: the operand that a view of it is, which
  // lies offset_bytes further and has the strides of `view` in host memory.
  virtual Tensor constant_view(const Buffer& uploaded, const Layout& whole, const Layout& view,
                               int64_t offset_bytes) const;
  // Runs the steps in order. scratch holds the largest scratch_bytes of them. What it computes is
  // there, for the host too, after sync().
  virtual void run(std::span<const Step> steps, const Buffer& scratch,
                   const Checkpoint& checkpoint) = 0;
  // The steps and the memory they name stay where they are as long as the program lives.
  virtual std::unique_ptr<Program> compile(std::span<const Step> steps, const Buffer& scratch);
  virtual void sync() = 0;

  // ---- beside others ----
  // Whether copy() takes the other's memory too, so that nothing goes by way of the host.
  virtual bool reaches(const Backend&) const { return false; }
  virtual std::unique_ptr<Mark> make_mark() { return nullptr; }  // null: others wait for sync()
  // What is given to this backend from now on begins once the mark, of any backend, is reached.
  virtual void follow(const Mark& mark) { mark.wait(); }
};

}  // namespace mla
