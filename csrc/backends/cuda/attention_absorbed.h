// The three launches of a window of tokens, see kernels/attention_{queries,narrow,wide,values}.cuh.
#pragma once

#include "backends/cuda/kernels/attention_schedule.cuh"

namespace mla::cuda {

// Whether k_b and v_b have shapes that the products take.
bool products_fit(const AttentionArgs& a);

// How the node is cut, and where in scratch its pieces lie; *scratch_bytes, unless null, is set to
// what they take. Without scratch: no memory. The window is the node's first.
AbsorbedPlan absorbed_plan(const AttentionArgs& a, const DeviceInfo& device, std::byte* scratch,
                           size_t* scratch_bytes = nullptr);
int absorbed_window(const AttentionArgs& a);  // tokens that go through at a time

// Whether the products of the node's windows are batched; the last window's too, however small.
bool batches_products(const AttentionArgs& a);
void launch_batched_queries(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run);
void launch_batched_values(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run);

// Batched where plan.x is there.
void launch_queries(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run);
void launch_attend(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run);
void launch_values(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run);

// The type of q, of weights and of parts of results: bf16 with a cache of that type, else f16.
inline bool operand_is_bf16(const AttentionArgs& a) { return a.latent.format == Format::BF16; }

}  // namespace mla::cuda
