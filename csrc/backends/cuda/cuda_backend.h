// One CUDA device: its memory, one stream, and the operations that run in it in order.
#pragma once

#include <memory>
#include <string>

#include "backends/cuda/fusion.h"
#include "backends/cuda/runtime.h"
#include "backends/cuda/staging.h"
#include "exec/backend.h"

namespace mla::cuda {

class CudaBackend final : public Backend {
 public:
  // record: programs that run again are replayed as one recorded graph. Throws DeviceError where
  // there is no such device, or it cannot run these kernels.
  explicit CudaBackend(int index, bool record = true);
  ~CudaBackend() override;

  std::string_view name() const override { return name_; }  // "cuda:0"
  const DeviceInfo& device() const { return device_; }
  bool supports_op(const Node& node) const override;
  std::string refusal(const Node& node) const override;
  bool shares_host_memory() const override { return false; }
  size_t scratch_bytes(const Node& node) const override;
  Buffer alloc(size_t bytes, Placement placement) override;
  Buffer alloc_host(size_t bytes) override;
  void zero(const Buffer& buffer) override;
  size_t free_bytes() const override;
  void copy(const Tensor& dst, const Tensor& src) override;
  Buffer upload(const Tensor& host) override;
  Tensor constant_view(const Buffer& uploaded, const Layout& whole, const Layout& view,
                       int64_t offset_bytes) const override;
  void run(std::span<const Step> steps, const Buffer& scratch,
           const Checkpoint& checkpoint) override;
  std::unique_ptr<Program> compile(std::span<const Step> steps, const Buffer& scratch) override;
  void sync() override;
  bool reaches(const Backend& other) const override;
  std::unique_ptr<Mark> make_mark() override;
  void follow(const Mark& mark) override;

  // As run(), of steps that fuse() has made launches of.
  void run(std::span<const Launch> launches, const Buffer& scratch, const Checkpoint& checkpoint);

  bool records() const { return record_; }
  Stream stream() const { return stream_; }

 private:
  void upload_packed(const Tensor& host, std::byte* packed);

  std::string name_;
  DeviceInfo device_;
  bool record_;
  Stream stream_ = nullptr;
  std::unique_ptr<Staging> staging_;
};

}  // namespace mla::cuda
