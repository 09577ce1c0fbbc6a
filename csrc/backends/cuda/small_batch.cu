// Which blocks and how much memory a product of a few rows gets.
#include "backends/cuda/small_batch.h"

#ifndef MLA_CUDA_EMULATE
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <cstdlib>

#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/product_finish.h"
#include "backends/cuda/product_kernels.h"
#include "backends/cuda/room.h"

namespace mla::cuda {
namespace {

// What a block has besides its rings: JobTable and TileEnd, and 1 KiB that the system takes.
constexpr size_t kOtherBytes = 6 << 10;

struct Plan {
  SmallBatch batch;
  int tiles_index = 0;  // of ProductKernels::small_batch: 2^i tiles of 8 columns
  int n_blocks = 0;
  int64_t n_steps = 0;  // at most
  size_t smem_bytes = 0;
  bool sum_after = false;  // products of every pair are kept and summed by another kernel
  int64_t n_staged = 0;    // rows of x

  int n_tiles() const { return 1 << tiles_index; }
  int64_t part_floats() const {
    return int64_t{2} * n_blocks * n_tiles() * 4 * small_batch_threads(n_tiles());
  }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of x that one job is likely to have.
int64_t likely_rows(const Product& p) {
  if (!p.routed) return p.rows_per_matrix();
  const int64_t twice_mean = 2 * p.n_rows() / std::max(p.n_experts, 1) + 1;
  return std::min(twice_mean, p.n_rows());
}

// What the kernels of this format were compiled for: that of the device, or an older one whose
// portable form they were made of. Their steps depend on it.
int code_version(const ProductKernels& kernels, const DeviceInfo& device) {
#ifndef MLA_CUDA_EMULATE
  cudaFuncAttributes attributes;
  const auto* kernel = reinterpret_cast<const void*>(kernels.small_batch[0]);
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return attributes.ptxVersion;
  (void)cudaGetLastError();
  return device.capability();
#else
  (void)kernels, (void)device;
  return MLA_CUDA_ARCH / 10;
#endif
}

void set_planes(SmallBatch& b) {
  const FormatTraits& t = traits(b.product.w.format);
  for (int i = 0; i <= kMaxPlanes; ++i) {
    const int64_t at = t.quantized ? plane_offset(packed_fields(b.product.w.format), i,
                                                  b.product.k / t.block_elems)
                                   : (i == 0 ? 0 : 2 * int64_t{b.product.k});
    b.planes[i] = static_cast<int>(at);
  }
}

// With 2^tiles_index tiles of columns.
Plan make_plan(const Product& product, Finish finish, const DeviceInfo& device, int tiles_index) {
  const ProductKernels& kernels = product_kernels(product.w.format);
  Plan plan;
  plan.tiles_index = tiles_index;
  const int n_tiles = plan.n_tiles(), n_warps = small_batch_warps(n_tiles);
  SmallBatch& b = plan.batch;
  b.product = product;
  b.finish = finish;
  plan.sum_after = product.summed;
  if (plan.sum_after) {
    b.product.summed = false;
    b.product.has_residual = false;
    b.product.n_slots = 1;
  }
  set_planes(b);
  b.n_units = static_cast<int>(ceil_div(product.k, kernels.unit));
  b.pitch = staged_pitch(kernels.layout, product.k);
  b.tiles_per_job =
      static_cast<int>(ceil_div(product.n, int64_t{n_warps} * (product.swiglu ? 8 : 16)));
  if (!product.routed) {
    b.rows_per_matrix = static_cast<int>(product.rows_per_matrix());
    b.column_tiles = static_cast<int>(ceil_div(b.rows_per_matrix, 8 * n_tiles));
    b.n_jobs = product.n_matrices[0] * product.n_matrices[1] * b.column_tiles;
  }
  const Steps steps =
      steps_of(kernels.w_unit_bytes, kernels.x_unit_bytes, n_tiles, code_version(kernels, device));
  b.n_steps = static_cast<int>(ceil_div(b.n_units, steps.units));
  plan.smem_bytes =
      static_cast<size_t>(steps.units) * static_cast<size_t>(steps.stages) *
      static_cast<size_t>(stage_bytes_of(kernels.w_unit_bytes, kernels.x_unit_bytes, n_tiles));
  const size_t of_sm = device.smem_per_block + 1024;
  const int per_sm = std::clamp<int>(static_cast<int>(of_sm / (plan.smem_bytes + kOtherBytes)), 1,
                                     small_batch_blocks(n_tiles));
  const int64_t jobs = product.routed ? product.n_rows() : b.n_jobs;
  plan.n_steps = jobs * b.tiles_per_job * b.n_steps;
  plan.n_blocks = static_cast<int>(std::min(plan.n_steps, int64_t{device.n_sm} * per_sm));
  plan.n_staged = product.slots_share_x() ? product.extent[1] : product.n_rows();
  return plan;
}

// Shares of blocks are counted in 32 bits.
bool fits(const Plan& plan, const DeviceInfo& device) {
  return plan.smem_bytes + kOtherBytes <= device.smem_per_block &&
         (plan.n_steps + 1) * plan.n_blocks < int64_t{1} << 31;
}

// As many columns as rows are likely to meet a matrix, or as memory allows.
Plan make_plan(const Product& product, Finish finish, const DeviceInfo& device) {
  const int64_t rows = likely_rows(product);
  int index = rows <= 8 ? 0 : rows <= 16 ? 1 : rows <= 32 ? 2 : 3;
  Plan plan = make_plan(product, finish, device, index);
  while (index > 0 && !fits(plan, device)) plan = make_plan(product, finish, device, --index);
  return plan;
}

struct Memory {
  std::byte* staged;
  float* scales;
  int* counters;
  float* parts;
  float* products = nullptr;

  Memory(const Plan& plan, Room& room)
      : staged(room.take<std::byte>(plan.n_staged * plan.batch.pitch)),
        scales(room.take<float>(plan.n_staged)),
        counters(room.take<int>(plan.n_blocks)),
        parts(room.take<float>(plan.part_floats())) {
    const Product& p = plan.batch.product;
    if (plan.sum_after) products = room.take<float>(p.n_rows() * p.n);
  }
};

bool readable_in_pieces(const Weight& w, int k) {
  // Kernels count the bytes of 16 rows in 32 bits.
  if (std::abs(w.row_stride) >= int64_t{1} << 26) return false;
  if (traits(w.format).quantized) return true;
  return w.step == 2 && k % 8 == 0 && w.row_stride % 16 == 0 && w.matrix_stride[0] % 16 == 0 &&
         w.matrix_stride[1] % 16 == 0 && reinterpret_cast<uintptr_t>(w.data) % 16 == 0;
}

void stage(const CudaRun& run, const Plan& plan, const Memory& memory) {
  const Product& p = plan.batch.product;
  const int64_t strides[4] = {p.x_stride[0], p.x_stride[1], p.x_stride[2], p.x_step};
  StageRows s;
  s.product = p;
  s.fours = fours_are_aligned(p.x, p.x_format, strides);
  s.out = memory.staged;
  s.scales = memory.scales;
  s.pitch = plan.batch.pitch;
  s.counters = memory.counters;
  s.n_counters = plan.n_blocks;
  const int threads = std::min(32 * staged_units(p.k), kMaxStageThreads);
  launch(run, product_kernels(p.w.format).stage_rows, dim3(static_cast<unsigned>(plan.n_staged)),
         dim3(static_cast<unsigned>(threads)), 0, s);
}

}  // namespace

bool small_batch_fits(const Product& p, const DeviceInfo& device) {
  if (product_kernels(p.w.format).small_batch[0] == nullptr || p.k == 0 || p.w.transposed) {
    return false;
  }
  if (p.k > kMaxStagedK || !readable_in_pieces(p.w, p.k)) return false;
  if (p.swiglu && (p.up.format != p.w.format || p.up.row_stride != p.w.row_stride ||
                   !readable_in_pieces(p.up, p.k))) {
    return false;
  }
  if (p.routed) {
    if (p.n_rows() > kMaxRoutedPairs || p.n_experts > kMaxRoutedExperts) return false;
    if (p.summed && p.n_slots == 0) return false;
  } else if (p.rows_per_matrix() > kMaxSmallRows) {
    return false;
  }
  return fits(make_plan(p, Finish::store, device), device);
}

size_t small_batch_scratch_bytes(const Product& product, const DeviceInfo& device) {
  Room room(nullptr);
  Memory(make_plan(product, Finish::store, device), room);
  return room.used_bytes();
}

void run_small_batch(const CudaRun& run, const Product& product, Finish finish) {
  Plan plan = make_plan(product, finish, run.device);
  Room room(run.scratch);
  const Memory memory(plan, room);
  stage(run, plan, memory);
  SmallBatch& b = plan.batch;
  b.staged = memory.staged;
  b.scales = memory.scales;
  b.counters = memory.counters;
  b.parts = memory.parts;
  if (plan.sum_after) b.product.out = memory.products;
  const int n_tiles = plan.n_tiles();
  launch(run, product_kernels(product.w.format).small_batch[plan.tiles_index],
         dim3(static_cast<unsigned>(plan.n_blocks)),
         dim3(static_cast<unsigned>(small_batch_threads(n_tiles))), plan.smem_bytes, b);
  if (plan.sum_after) sum_slots(run, product, memory.products);
}

}  // namespace mla::cuda
