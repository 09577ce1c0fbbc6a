// Which products of one row run on matvec.cuh, and on how many blocks.
#include "backends/cuda/matvec.h"

#include <algorithm>

#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/product_kernels.h"

namespace mla::cuda {
namespace {

constexpr int kFewestWarps = 4;
constexpr size_t kStaticSmemBytes = 1024;  // what the kernel has beside, and its alignment
constexpr int kMostSlots = 32;             // a warp keeps the experts of a token, one in each lane

int divide_up(int a, int b) { return (a + b - 1) / b; }

bool takes_quantized(const Weight& w) {
  return traits(w.format).quantized && !w.transposed && w.row_stride >= 0;
}

int rows_of_x(const Product& p) { return p.routed && !p.slots_share_x() ? p.extent[2] : 1; }

bool x_fits(const Product& p) {
  const int64_t strides[4] = {0, 0, 0, p.x_step};
  if (rows_of_x(p) > 1 && p.x_stride[2] != p.k * p.x_step) return false;
  return p.x_format == Format::F32 && fours_are_aligned(p.x, p.x_format, strides);
}

bool norm_fits(const Norm& norm) {
  return !norm.used || (norm.weight != nullptr && norm.weight_stride == int64_t{sizeof(float)} &&
                        reinterpret_cast<uintptr_t>(norm.weight) % 16 == 0);
}

size_t smem_bytes(const MatVec& m, const MatVecKernel& kernel) {
  const int parts = m.weights != nullptr ? 2 * m.pairs_per_block * m.n_slots : 0;
  const int n_floats = (m.copies_x ? m.n_x * m.k : 0) + parts;
  return static_cast<size_t>(m.n_x * staged_bytes(m.k) + m.n_warps * kernel.warp_bytes) +
         static_cast<size_t>(n_floats) * sizeof(float);
}

void set_x(MatVec& m, const Product& p) {
  m.x = reinterpret_cast<const float*>(p.x);
  m.n_x = rows_of_x(p);
  m.k = p.k;
  m.norm = p.norm;
}

void set_weights(MatVec& m, const Product& p, const MatVecKernel& kernel) {
  const int n_blocks = p.k / static_cast<int>(traits(p.w.format).block_elems);
  m.w[0] = p.w.data;
  m.w[1] = p.swiglu ? p.up.data : p.w.data;
  m.matrix_stride = p.w.matrix_stride[1];
  m.row_step = p.w.row_stride;
  m.row_bytes = static_cast<int>(packed_row_bytes(p.w.format, p.k));
  m.n = p.n;
  m.planes = kernel.planes(n_blocks);
  m.n_segments = divide_up(n_blocks, kernel.segment_blocks);
  m.n_pieces = n_blocks * kernel.block_pieces;
}

void set_routing(MatVec& m, const Product& p) {
  if (!p.routed) return;
  m.ids = reinterpret_cast<const int32_t*>(p.ids);
  m.id_stride = p.id_stride[1] / int64_t{sizeof(int32_t)};
  m.n_slots = p.summed ? p.n_slots : p.extent[2];
  m.n_experts = p.n_experts;
  if (!p.summed) return;
  m.weights = reinterpret_cast<const float*>(p.weights);
  m.weight_stride = p.weight_stride[1] / int64_t{sizeof(float)};
}

// How the work is divided among blocks of n_warps. Where slots are summed, a block has some pairs
// of all of them.
int divide(MatVec& m, int n_warps, const DeviceInfo& device) {
  m.n_warps = n_warps;
  if (m.weights != nullptr) {
    m.pairs_per_block = std::min(divide_up(m.n_pairs, device.n_sm), 32 * n_warps / 2);
    m.units_per_warp = divide_up(m.pairs_per_block * m.n_slots, n_warps);
    return divide_up(m.n_pairs, m.pairs_per_block);
  }
  const int n_units = m.n_pairs * m.n_slots;
  m.units_per_warp = divide_up(n_units, device.n_sm * n_warps);
  return std::min(divide_up(n_units, m.units_per_warp), device.n_sm);
}

struct Plan {
  MatVec m;
  int n_blocks = 0;
  size_t smem_bytes = 0;
  bool fits = false;
};

// One block for each multiprocessor, or x would be staged more often; as many warps as have room.
Plan make_plan(const Product& p, const DeviceInfo& device) {
  const MatVecKernel& kernel = product_kernels(p.w.format).matvec;
  Plan plan;
  MatVec& m = plan.m;
  set_x(m, p);
  set_weights(m, p, kernel);
  set_routing(m, p);
  m.residual = p.has_residual ? reinterpret_cast<const float*>(p.residual) : nullptr;
  m.residual_step = p.residual_step / int64_t{sizeof(float)};
  m.out = p.out;
  m.swiglu = p.swiglu;
  m.n_pairs = p.swiglu ? p.n : divide_up(p.n, 2);
  m.pair_bytes = (p.swiglu ? 1 : 2) * m.row_step;
  for (int n_warps = kMostMatVecWarps; n_warps >= kFewestWarps && !plan.fits; n_warps /= 2) {
    plan.n_blocks = divide(m, n_warps, device);
    for (const bool copies : {true, false}) {
      m.copies_x = copies;
      plan.smem_bytes = smem_bytes(m, kernel);
      plan.fits = plan.smem_bytes + kStaticSmemBytes <= device.smem_per_block;
      if (plan.fits) break;
    }
  }
  return plan;
}

bool halves_match(const Product& p) {
  return !p.swiglu ||
         (p.up.format == p.w.format && takes_quantized(p.up) && p.up.row_stride == p.w.row_stride &&
          p.up.matrix_stride[1] == p.w.matrix_stride[1]);
}

}  // namespace

bool matvec_fits(const Product& p, const DeviceInfo& device) {
  if (p.k == 0 || p.n == 0 || !takes_quantized(p.w) || !halves_match(p)) return false;
  if (p.extent[0] != 1 || p.extent[1] != 1 || p.extent[2] == 0 || p.extent[2] > kMostSlots) {
    return false;
  }
  if (!p.routed && (p.extent[2] != 1 || p.n_matrices[0] * p.n_matrices[1] != 1)) return false;
  if (!x_fits(p) || !norm_fits(p.norm) || (p.summed && p.n_slots == 0)) return false;
  return make_plan(p, device).fits;
}

void run_matvec(const CudaRun& run, const Product& p) {
  Plan plan = make_plan(p, run.device);
  plan.m.waits_last = run.overlap == Overlap::waits_last;
  launch(run, product_kernels(p.w.format).matvec.kernel, dim3(static_cast<unsigned>(plan.n_blocks)),
         dim3(static_cast<unsigned>(32 * plan.m.n_warps)), plan.smem_bytes, plan.m);
}

}  // namespace mla::cuda
