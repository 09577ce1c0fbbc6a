// Another backend restricted to some ops, with memory of its own: shows, on a machine without any
// device, what the planner does where a device lacks an op.
#pragma once

#include <memory>
#include <set>
#include <string>

#include "exec/backend.h"

namespace mla {

class SubsetBackend final : public Backend {
 public:
  SubsetBackend(std::shared_ptr<Backend> inner, std::set<std::string> ops);
  std::string_view name() const override { return "subset"; }
  bool supports_op(const Node& node) const override;
  bool shares_host_memory() const override { return false; }
  size_t scratch_bytes(const Node& node) const override { return inner_->scratch_bytes(node); }
  Buffer alloc(size_t bytes, Placement placement) override {
    return inner_->alloc(bytes, placement);
  }
  void copy(const Tensor& dst, const Tensor& src) override { inner_->copy(dst, src); }
  void run(std::span<const Step> steps, const Buffer& scratch,
           const Checkpoint& checkpoint) override;
  void sync() override { inner_->sync(); }

  int64_t n_steps() const { return n_steps_; }  // run here so far

 private:
  std::shared_ptr<Backend> inner_;
  std::set<std::string> ops_;
  int64_t n_steps_ = 0;
};

}  // namespace mla
