// The CPU: kernels of one ISA, run by one thread pool.
#pragma once

#include <memory>
#include <string_view>

#include "backends/cpu/kernels.h"
#include "backends/cpu/read_log.h"
#include "exec/backend.h"
#include "sys/thread_pool.h"

namespace mla::cpu {

// Rates per second; 0 where the ISA has no such unit.
struct Peak {
  double read_bytes = 0;
  double f32_ops = 0, int8_ops = 0, bf16_ops = 0;  // two per multiply-add
};

class CpuBackend final : public Backend {
 public:
  CpuBackend(std::shared_ptr<sys::ThreadPool> pool, std::string_view isa = "");
  std::string_view name() const override { return "cpu"; }
  std::string_view isa() const { return kernels_.isa; }
  const KernelTable& kernels() const { return kernels_; }
  int n_threads() const { return pool_->n_threads(); }
  // The best of n_repeats runs of the probes on all threads, over read_bytes of memory of their
  // own. It takes a fraction of a second; other work on the machine lowers what is found.
  Peak measure_peak(size_t read_bytes, int n_repeats);
  bool supports_op(const Node& node) const override;
  bool shares_host_memory() const override { return true; }
  size_t scratch_bytes(const Node& node) const override;
  Buffer alloc(size_t bytes, Placement placement) override;
  void copy(const Tensor& dst, const Tensor& src) override;
  void run(std::span<const Step> steps, const Buffer& scratch,
           const Checkpoint& checkpoint) override;
  void sync() override {}

  // From now on reads of weights are counted, which costs some time and memory; what was counted
  // before is forgotten.
  void count_reads(bool on);
  // What was read since the last call; nothing where it is not counted.
  std::vector<ReadLog::Traffic> take_reads();
  const std::vector<sys::NodeShare>& nodes() const { return pool_->nodes(); }

 private:
  std::shared_ptr<sys::ThreadPool> pool_;
  const KernelTable& kernels_;
  std::unique_ptr<ReadLog> reads_;
};

}  // namespace mla::cpu
