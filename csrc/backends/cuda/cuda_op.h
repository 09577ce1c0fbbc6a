// What one operation is on this device, and what it is given to run.
#pragma once

#include <string_view>

#include "backends/cuda/runtime.h"
#include "exec/backend.h"

namespace mla::cuda {

// A tensor as kernels take it: by value, without host code. Bytes, outermost first.
struct View {
  std::byte* data = nullptr;
  Format format = Format::F32;
  int64_t extent[kMaxRank] = {1, 1, 1, 1};
  int64_t stride[kMaxRank] = {0, 0, 0, 0};
};

inline View view(const Tensor& t) {
  View v{t.data, t.format, {}, {}};
  for (int i = 0; i < kMaxRank; ++i) {
    v.extent[i] = t.shape.extent[static_cast<size_t>(i)];
    v.stride[i] = t.stride[static_cast<size_t>(i)];
  }
  return v;
}

struct CudaOp {
  // Why the node cannot run here; empty where it can. Pure.
  std::string_view (*refusal)(const Node&, const DeviceInfo&);
  size_t (*scratch_bytes)(const Node&, const DeviceInfo&);
  // Enqueues kernels and nothing else: a run is recorded once and replayed with other inputs.
  void (*run)(const Step&, const CudaRun&);
};

}  // namespace mla::cuda
