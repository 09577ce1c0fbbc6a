// How a product of gemm.h is cut into tiles: plain numbers, planned apart from the kernels.
#pragma once

#include <string>

#include "backends/cuda/gemm.h"

namespace mla::cuda {

struct GemmPlan {
  enum class Path : uint8_t {
    mma,    // mma.sync: any device
    wgmma,  // warpgroup products fed by the copy engine: 9.0 alone
  };
  Path path = Path::mma;
  int tile_m = 0, tile_n = 0;  // rows of a and rows of b per tile; fused: half of b, half of b_up
  int n_split = 1;             // parts that k is cut into, summed afterwards
  int k_split = 0;             // their size
  int grid = 0;                // blocks, each of which takes every grid-th tile

  std::string str() const;  // "wgmma 128x256, 132 blocks"
};

// Columns of the k loop's steps; parts of k are multiples of it.
inline constexpr int kWgmmaStep = 64;

// `wgmma`: the device has it, and the build the code.
GemmPlan plan_gemm(const Gemm& gemm, const DeviceInfo& device, bool wgmma);
GemmPlan plan_grouped_gemm(const GroupedGemm& gemm, const DeviceInfo& device, bool wgmma);

}  // namespace mla::cuda
