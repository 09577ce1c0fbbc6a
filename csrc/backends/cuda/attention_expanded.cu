// Plans rounds of cells, and for each: gathers latents, expands them, attends.
#include "backends/cuda/attention_expanded.h"

#include <algorithm>
#include <type_traits>

#include "backends/cuda/dequantize.h"
#include "backends/cuda/gemm.h"
#include "backends/cuda/gemm_wgmma.h"
#include "backends/cuda/kernels/attention_expanded.cuh"
#include "backends/cuda/kernels/expanded_warpgroups.cuh"

namespace mla::cuda {
namespace {

// Real models: N = V = 128, R = 64. 128 queries a block, 68 KB of shared memory: two blocks have
// room in the 164 KB of an 8.0 multiprocessor, and 64 cells a step would not fit the registers.
using Usual = ExpandedDims<2, 32, 128, 64, 128>;
// Any dimensions, half the queries and keys: at most 56 KB (64 KB with V > 128).
using Narrow = ExpandedDims<1, 32, 0, 0, 128>;
using Wide = ExpandedDims<1, 32, 0, 0, 256>;

constexpr size_t kStaticSmemBytes = 1024;  // at most: factors of the rows, jobs

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t pad8(int64_t n) { return ceil_div(n, 8) * 8; }
int padded_dim(const AttentionArgs& a) {
  return static_cast<int>(ceil_div(a.n + pad8(a.r), 16) * 16);
}

// Calls use(D{}) with the dimensions that serve the node; false where none do.
template <class Use>
bool with_dims(const AttentionArgs& a, const DeviceInfo& device, const Use& use) {
  const int dim = padded_dim(a);
  const auto fits = [&](size_t bytes) { return bytes + kStaticSmemBytes <= device.smem_per_block; };
  const bool usual = a.n == Usual::kNope && a.r == Usual::kRope && a.v == Usual::kValue;
  if (usual && has_wgmma(device) && fits(warpgroups::kSmemBytes)) {
    use(ExpandedWarpgroups{});
  } else if (usual && fits(expanded_smem_bytes<Usual>(dim))) {
    use(Usual{});
  } else if (a.v <= Narrow::kValue && fits(expanded_smem_bytes<Narrow>(dim))) {
    use(Narrow{});
  } else if (a.v <= Wide::kValue && fits(expanded_smem_bytes<Wide>(dim))) {
    use(Wide{});
  } else {
    return false;
  }
  return true;
}

// Pieces of scratch, 256-byte aligned; from null, only their offsets count.
struct Scratch {
  std::byte* begin;
  size_t used = 0;
  template <class X>
  X* take(int64_t n) {
    X* at = reinterpret_cast<X*>(begin + used);
    used += (static_cast<size_t>(n) * sizeof(X) + 255) / 256 * 256;
    return at;
  }
};

struct ExpandedMemory {
  ExpandedPlan plan;
  GatheredCells cells;
  __half* weights;   // [H N + H V, c_padded]
  __half* expanded;  // [cells, H N + H V]
  float2* running;   // [T, H]
  size_t bytes;
};

ExpandedMemory carve(const AttentionArgs& a, int tile_rows, size_t max_cell_bytes,
                     std::byte* scratch) {
  ExpandedMemory m = {};
  const int64_t row_elems = int64_t{a.h} * (a.n + a.v);
  m.cells.c_padded = static_cast<int>(pad8(a.c));
  m.cells.r_padded = static_cast<int>(pad8(a.r));
  const int64_t cell_bytes =
      (row_elems + m.cells.c_padded + m.cells.r_padded) * int64_t{sizeof(__half)};
  const int64_t max_spans = std::min(a.n_spans, a.t);
  const int64_t groups_of_span = ceil_div(int64_t{a.n_blocks} * a.block_cells, kGroupCells);
  const int64_t n_groups = std::max<int64_t>(max_spans * groups_of_span, 1);
  const int64_t fitting = static_cast<int64_t>(max_cell_bytes) / (cell_bytes * kGroupCells);
  const int64_t round_groups = std::clamp<int64_t>(fitting, 1, n_groups);
  m.plan.tile_rows = tile_rows;
  m.plan.max_tiles = static_cast<int>(a.t / tile_rows + max_spans);
  m.plan.max_groups = static_cast<int>(n_groups);
  m.plan.n_rounds = static_cast<int>(ceil_div(n_groups, round_groups));
  m.plan.cells = static_cast<int>(round_groups * kGroupCells);
  Scratch room{scratch};
  m.plan.tiles = room.take<ExpandedTile>(m.plan.max_tiles);
  m.plan.groups = room.take<ExpandedGroup>(n_groups);
  m.plan.n_tiles = room.take<int>(1);
  m.plan.rows = room.take<int>(m.plan.n_rounds);
  m.plan.counters = room.take<int>(m.plan.n_rounds);
  m.running = room.take<float2>(int64_t{a.t} * a.h);
  m.weights = room.take<__half>(row_elems * m.cells.c_padded);
  m.cells.latent = room.take<__half>(int64_t{m.plan.cells} * m.cells.c_padded);
  m.cells.rope = room.take<__half>(int64_t{m.plan.cells} * m.cells.r_padded);
  m.expanded = room.take<__half>(m.plan.cells * row_elems);
  m.bytes = room.used;
  return m;
}

// k_b and v_b as rows of f16: [H, N, C] and behind it [H, V, C].
void load_weights(const CudaRun& run, const AttentionArgs& a, const ExpandedMemory& m) {
  const int64_t k_rows = int64_t{a.h} * a.n;
  const int64_t v_rows = int64_t{a.h} * a.v;
  const int64_t width = m.cells.c_padded;
  if (a.k_b_transposed) {
    dequantize_rows(run, a.k_b, 0, k_rows, Operand::f16, m.weights, width);
  } else {
    dequantize_transposed(run, a.k_b, Operand::f16, m.weights, width);
  }
  dequantize_rows(run, a.v_b, 0, v_rows, Operand::f16, m.weights + k_rows * width, width);
}

void expand(const CudaRun& run, const AttentionArgs& a, const ExpandedMemory& m, int round) {
  const ExpandedPlan& plan = m.plan;
  launch(run, gather_cells, dim3(static_cast<unsigned>(plan.cells / kGatherRows)),
         dim3(kGatherThreads), 0, a, plan, round, m.cells);
  Gemm product;
  product.result = Result::f16;
  product.m = plan.cells;
  product.n = a.h * (a.n + a.v);
  product.k = a.c;
  product.a = m.cells.latent;
  product.b = m.weights;
  product.c = m.expanded;
  product.lda = product.ldb = m.cells.c_padded;
  product.ldc = product.n;
  product.m_limit = plan.rows + round;
  gemm(run, product);
}

ExpandedArgs expanded_args(const AttentionArgs& a, const ExpandedMemory& m) {
  ExpandedArgs args = {};
  args.q_nope = a.q_nope;
  args.q_rope = a.q_rope;
  args.keys = m.expanded;
  args.values = m.expanded + int64_t{a.h} * a.n;
  args.rope = m.cells.rope;
  args.row_elems = int64_t{a.h} * (a.n + a.v);
  args.out = a.out;
  args.running = m.running;
  args.plan = m.plan;
  args.h = a.h;
  args.n = a.n;
  args.r = a.r;
  args.v = a.v;
  args.r_padded = m.cells.r_padded;
  args.dim = padded_dim(a);
  args.scale = a.scale;
  return args;
}

template <class D>
void attend_round(const CudaRun& run, ExpandedArgs args, int round) {
  args.round = round;
  constexpr bool kWarpgroups = std::is_same_v<D, ExpandedWarpgroups>;
  const int64_t n_items = int64_t{args.plan.max_tiles} * args.h;
  const int64_t resident = (kWarpgroups ? 1 : 2) * int64_t{run.device.n_sm};
  const dim3 grid(static_cast<unsigned>(std::min(n_items, resident)));
  if constexpr (kWarpgroups) {
    launch(run, attend_warpgroups, grid, dim3(D::kThreads), warpgroups::kSmemBytes, args);
  } else {
    launch(run, attend_expanded<D>, grid, dim3(kExpandedThreads), expanded_smem_bytes<D>(args.dim),
           args);
  }
}

template <class D>
void run_rounds(const CudaRun& run, const AttentionArgs& a, size_t max_cell_bytes) {
  const ExpandedMemory m = carve(a, D::kRows, max_cell_bytes, run.scratch);
  launch(run, plan_expanded, dim3(1), dim3(kPlanThreads), 0, a, m.plan);
  load_weights(run, a, m);
  const ExpandedArgs args = expanded_args(a, m);
  for (int i = 0; i < m.plan.n_rounds; ++i) {
    expand(run, a, m, i);
    attend_round<D>(run, args, i);
  }
}

}  // namespace

bool expanded_fits(const Node& node, const DeviceInfo& device) {
  const AttentionArgs a = attention_args(node, nullptr);
  return node.attr<AttentionAttrs>().precision == Precision::fast && a.n % 8 == 0 && a.v % 8 == 0 &&
         a.n > 0 && a.v > 0 && padded_dim(a) <= kMaxExpandedDim &&
         with_dims(a, device, [](auto) {});
}

size_t expanded_scratch_bytes(const Node& node, const DeviceInfo& device, size_t max_cell_bytes) {
  const AttentionArgs a = attention_args(node, nullptr);
  size_t bytes = 0;
  with_dims(a, device,
            [&]<class D>(D) { bytes = carve(a, D::kRows, max_cell_bytes, nullptr).bytes; });
  return bytes;
}

size_t expanded_scratch_bytes(const Node& node, const DeviceInfo& device) {
  return expanded_scratch_bytes(node, device, kExpandedBytes);
}

void attention_expanded(const Step& step, const CudaRun& run, size_t max_cell_bytes) {
  const AttentionArgs a = attention_args(step);
  if (a.t == 0 || a.h == 0 || a.n_spans == 0) return;
  with_dims(a, run.device, [&]<class D>(D) { run_rounds<D>(run, a, max_cell_bytes); });
}

void attention_expanded(const Step& step, const CudaRun& run) {
  attention_expanded(step, run, kExpandedBytes);
}

}  // namespace mla::cuda
