// The expanded contraction on tensor cores: which shapes it takes, and in how much memory.
#pragma once

#include "backends/cuda/attention.h"

namespace mla::cuda {

// Keys and values of as many cells as fit exist at a time; longer contexts go through in rounds.
// 256 MiB hold 27,000 cells of 16 heads of 128 + 128 numbers and 3,300 of 128 heads.
inline constexpr size_t kExpandedBytes = size_t{256} << 20;

// Whether attention_expanded() can run the node: `fast`, heads of up to 256 numbers (keys with
// their rope part) in multiples of 8, shared memory for a tile of queries. False:
// attention_exact().
bool expanded_fits(const Node& node, const DeviceInfo& device);

// As in attention.h, but with another bound on the scratch for cells (at least one group of them).
size_t expanded_scratch_bytes(const Node& node, const DeviceInfo& device, size_t max_cell_bytes);
void attention_expanded(const Step& step, const CudaRun& run, size_t max_cell_bytes);

}  // namespace mla::cuda
