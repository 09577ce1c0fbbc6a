// The way of gemm.h on devices of capability 9.0.
#pragma once

#include "backends/cuda/gemm_plan.h"

namespace mla::cuda {

struct GemmParams;

// The device multiplies in warpgroups, and this build has the code for it.
bool has_wgmma(const DeviceInfo& device);

// Both as planned with Path::wgmma.
void launch_wgmma(const CudaRun& run, Operand operand, const GemmPlan& plan, const GemmParams& p);

}  // namespace mla::cuda
