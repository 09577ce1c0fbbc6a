// Steps that are recorded once they run a second time, and replayed as one graph from then on.
#pragma once

#include "backends/cuda/cuda_backend.h"

namespace mla::cuda {

class CudaProgram final : public Program {
 public:
  CudaProgram(CudaBackend& backend, std::span<const Step> steps, Buffer scratch)
      : backend_(backend), launches_(fuse(steps, backend.device())), scratch_(std::move(scratch)) {}
  void run(const Checkpoint& checkpoint) override;

 private:
  void record();

  CudaBackend& backend_;
  std::vector<Launch> launches_;
  Buffer scratch_;
  RecordedGraph graph_;
  int n_runs_ = 0;
};

}  // namespace mla::cuda
