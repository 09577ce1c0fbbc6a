// Steps as launches: what a kernel takes over from the steps around it.
//
// A decoded token is some hundred kernels of a few microseconds, of which each waits for the one
// before. So products take their row's RMS norm themselves, a write to the cache its norm and its
// rotation, attention the rotation of its queries; and a product that needs nothing of the step
// before it runs beside that.
#pragma once

#include <span>
#include <vector>

#include "backends/cuda/cuda_op.h"

namespace mla::cuda {

struct Launch {
  const Step* step = nullptr;
  Neighbours neighbours;
  Overlap overlap = Overlap::waits_first;
};

// In the order of the steps, which stay where they are. What a launch takes over has none of its
// own.
std::vector<Launch> fuse(std::span<const Step> steps, const DeviceInfo& device);

}  // namespace mla::cuda
