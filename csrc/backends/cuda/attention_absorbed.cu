// Absorbed attention: which variants a node needs, its scratch, and its launches.
#include "backends/cuda/attention_absorbed.h"

#include <algorithm>

#include "backends/cuda/kernels/attention_narrow.cuh"
#include "backends/cuda/kernels/attention_wide.cuh"

namespace mla::cuda {
namespace {

// Query rows that go through at a time: 38 MB of queries and as much of results, at any T.
constexpr int kWindowRows = 32768;
// A span of at most two tokens of 16 heads is read twice rather than computed in tiles of which
// half would be empty.
constexpr int kNarrowRows = 32;

int64_t align_256(int64_t bytes) { return (bytes + 255) / 256 * 256; }
int divide_up(int a, int b) { return (a + b - 1) / b; }

bool is_q8(const AttentionArgs& a) { return a.latent.format == Format::Q8_0; }

int latent_bytes(const AttentionArgs& a) { return is_q8(a) ? a.c / 32 * kQ8Bytes : 2 * a.c; }

// The most stages of those that fit; -1 where none does.
template <size_t N, class Bytes>
int stages_that_fit(const int (&stages)[N], const DeviceInfo& device, const Bytes& smem_bytes) {
  for (int n : stages) {
    if (static_cast<size_t>(smem_bytes(n)) <= device.smem_per_block) return n;
  }
  return -1;
}

AbsorbedVariant narrow_variant(const AttentionArgs& a, const DeviceInfo& device) {
  AbsorbedVariant v = {};
  v.rows = narrow::kRows;
  v.tile_cells = narrow::kTileCells;
  v.least_tiles = 4;
  const auto bytes = [&](int) { return narrow::smem_bytes(is_q8(a)); };
  v.n_stages = stages_that_fit({narrow::kStages}, device, bytes);
  v.fold = 1;
  v.n_blocks = 2 * std::max(device.n_sm, 1);
  return v;
}

bool begins_at(const void* p, int64_t stride, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0 && stride % bytes == 0;
}
bool copies_16(const AttentionArgs& a) {
  return begins_at(a.latent.data, a.latent.cell_bytes, 16) && latent_bytes(a) % 16 == 0 &&
         begins_at(a.rope.data, a.rope.cell_bytes, 16) && 2 * a.r % 16 == 0;
}

AbsorbedVariant wide_variant(const AttentionArgs& a, const DeviceInfo& device) {
  const bool q8 = is_q8(a);
  const auto bytes = [&](int n) { return wide::smem_bytes(q8, n); };
  AbsorbedVariant v = {};
  v.rows = wide::kRows;
  v.tile_cells = wide::kTileCells;
  v.least_tiles = 1;
  v.n_stages = q8 ? stages_that_fit({1, 0}, device, bytes) : stages_that_fit({2, 1}, device, bytes);
  v.fold = a.h % v.rows == 0 ? std::clamp(a.h / v.rows, 1, std::max(device.n_sm, 1)) : 1;
  v.n_blocks = std::max(device.n_sm / v.fold, 1);
  return v;
}

// Units of a window at most, whatever its spans.
int most_units(const AttentionArgs& a, const AbsorbedVariant& v, int n_tokens) {
  const int64_t by_token = int64_t{n_tokens} * divide_up(a.h, v.unit_rows());
  const int64_t by_span = int64_t{n_tokens} * a.h / v.unit_rows() + std::min(a.n_spans, n_tokens);
  return static_cast<int>(std::min(by_token, by_span));
}

// Hands out scratch in pieces of 256 bytes; without memory it only counts.
struct Pieces {
  std::byte* base;
  int64_t used = 0;

  template <class P>
  P* take(int64_t n) {
    std::byte* at = base != nullptr ? base + used : nullptr;
    used += align_256(n * int64_t{sizeof(P)});
    return reinterpret_cast<P*>(at);
  }
};

void place(const AttentionArgs& a, AbsorbedPlan& plan, Pieces& pieces) {
  const int n_tokens = absorbed_window(a);
  plan.q = pieces.take<std::byte>(int64_t{n_tokens} * a.h * kKeyDims * 2);
  plan.totals = pieces.take<WorkTotals>(kVariants);
  plan.entries = pieces.take<WorkEntry>(int64_t{kVariants} * a.n_spans);
  plan.token_entry = pieces.take<int>(n_tokens);
  if (batches_products(a)) {
    plan.x = pieces.take<__half>(int64_t{n_tokens} * a.h * a.n);
    plan.x_scale = pieces.take<float>(int64_t{n_tokens} * a.h);
    plan.weights = pieces.take<__half>(int64_t{a.h} * a.c * std::max(a.n, a.v));
  }
  for (AbsorbedVariant& v : plan.variants) {
    if (v.n_blocks == 0) continue;
    const int64_t slots = int64_t{most_units(a, v, n_tokens) + v.n_blocks} * v.fold;
    v.parts = pieces.take<std::byte>(slots * v.rows * kLatentDims * 2);
    v.lse = pieces.take<float>(slots * v.rows);
  }
}

template <class T, bool kQ8>
void attend(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run) {
  const auto run_variant = [&](auto kernel, const AbsorbedVariant& v, int smem_bytes) {
    if (v.n_blocks == 0) return;
    const dim3 grid(static_cast<unsigned>(v.n_blocks * v.fold));
    launch(run, kernel, grid, dim3(kTileThreads), static_cast<size_t>(smem_bytes), a, plan);
  };
  const AbsorbedVariant& few = plan.variants[kNarrow];
  const AbsorbedVariant& many = plan.variants[kWide];
  const bool by_16 = plan.copies_16;
  run_variant(by_16 ? narrow_kernel<T, kQ8, true> : narrow_kernel<T, kQ8, false>, few,
              narrow::smem_bytes(kQ8));
  run_variant(by_16 ? wide_kernel<T, kQ8, true> : wide_kernel<T, kQ8, false>, many,
              wide::smem_bytes(kQ8, many.n_stages));
}

// Planes whose rows begin, and end, at multiples of 4 bytes: what the smallest copies need.
bool plane_fits(const Node* plane, int row_bytes) {
  return root_of(const_cast<Node*>(plane)).offset_bytes % 4 == 0 && row_bytes % 4 == 0 &&
         plane->layout.stride[2] % 4 == 0;
}

}  // namespace

int absorbed_window(const AttentionArgs& a) {
  return std::clamp(kWindowRows / std::max(a.h, 1), 1, std::max(a.t, 1));
}

AbsorbedPlan absorbed_plan(const AttentionArgs& a, const DeviceInfo& device, std::byte* scratch,
                           size_t* scratch_bytes) {
  AbsorbedPlan plan = {};
  plan.end_token = std::min(absorbed_window(a), a.t);
  plan.copies_16 = copies_16(a);
  plan.variants[kNarrow] = narrow_variant(a, device);
  plan.variants[kWide] = wide_variant(a, device);
  const bool has_wide = plan.variants[kWide].n_stages >= 0;
  plan.widest_narrow = has_wide ? kNarrowRows : INT32_MAX;
  // No span can have fewer rows than a token, or more than all tokens of a window.
  if (a.h > plan.widest_narrow) plan.variants[kNarrow].n_blocks = 0;
  if (int64_t{absorbed_window(a)} * a.h <= plan.widest_narrow) plan.variants[kWide].n_blocks = 0;
  Pieces pieces = {scratch};
  place(a, plan, pieces);
  if (scratch_bytes != nullptr) *scratch_bytes = static_cast<size_t>(pieces.used);
  return plan;
}

bool absorbed_fits(const Node& node, const DeviceInfo& device) {
  const AttentionArgs a = attention_args(node, nullptr);
  const Format operand = operand_is_bf16(a) ? Format::BF16 : Format::F16;
  const auto is_given = [&](size_t i) {  // k_b and v_b are read before other kernels have ended
    const Op op = root_of(node.input(i)).node->op;
    return op == Op::weight || op == Op::input;
  };
  // A tile takes 74 KB: capability 7.5 has 64. A float32 cache is kept for its precision, which
  // operands of 16 bits would lose: both run in attention_exact.cu.
  return device.capability() >= 80 && a.latent.format != Format::F32 && a.rope.format == operand &&
         a.r <= kRopeDims && products_fit(a) && plane_fits(node.input(2), latent_bytes(a)) &&
         plane_fits(node.input(3), 2 * a.r) && is_given(4) && is_given(5) &&
         narrow_variant(a, device).n_stages > 0;
}

size_t absorbed_scratch_bytes(const Node& node, const DeviceInfo& device) {
  size_t bytes = 0;
  absorbed_plan(attention_args(node, nullptr), device, nullptr, &bytes);
  return bytes;
}

void launch_attend(const AttentionArgs& a, const AbsorbedPlan& plan, const CudaRun& run) {
  if (is_q8(a)) {
    attend<__half, true>(a, plan, run);
  } else if (operand_is_bf16(a)) {
    attend<__nv_bfloat16, false>(a, plan, run);
  } else {
    attend<__half, false>(a, plan, run);
  }
}

void attention_absorbed(const Step& step, const CudaRun& run) {
  AttentionArgs a = attention_args(step);
  if (run.neighbours.rope != nullptr) set_rotation(a, *run.neighbours.rope);
  a.queries_wait_last = run.overlap == Overlap::waits_last;
  AbsorbedPlan plan = absorbed_plan(a, run.device, run.scratch);
  const int window = absorbed_window(a);
  for (; plan.first_token < a.t; plan.first_token += window) {
    plan.end_token = std::min(plan.first_token + window, a.t);
    launch_queries(a, plan, run);
    a.queries_wait_last = false;
    launch_attend(a, plan, run);
    launch_values(a, plan, run);
  }
}

}  // namespace mla::cuda
