// The three launches of a window of tokens, see kernels/attention_{queries,absorbed,values}.cuh.
#pragma once

#include "backends/cuda/kernels/attention_schedule.cuh"

namespace mla::cuda {

// Whether k_b and v_b have shapes that the products take.
bool products_fit(const AttentionArgs& a);
// bf16: the operands' type is bf16, else f16.
void launch_queries(const AttentionArgs& a, const AbsorbedPlan& plan, bool bf16,
                    const CudaRun& run);
void launch_values(const AttentionArgs& a, const AbsorbedPlan& plan, bool bf16, const CudaRun& run);

// How a node is cut: all that follows from shapes and the device, without memory.
AbsorbedPlan absorbed_plan(const AttentionArgs& a, const DeviceInfo& device);
int absorbed_window(const AttentionArgs& a);  // tokens that go through at a time

}  // namespace mla::cuda
