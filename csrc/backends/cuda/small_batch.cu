// Which blocks and how much memory a product of a few rows gets.
#include "backends/cuda/small_batch.h"

#include <algorithm>
#include <cstdlib>

#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/product_finish.h"
#include "backends/cuda/product_kernels.h"
#include "backends/cuda/room.h"

namespace mla::cuda {
namespace {

// Numbers of x that each block converts by itself. Beyond, a kernel before does it for all: 40 KiB
// read by each of 264 blocks cost about as much as that kernel.
constexpr int64_t kMaxOwnElems = 20 * 1024;
// Rows of w per block: no fewer than read as many bytes as x has (of 4 bits against 32).
constexpr int kMinBlockRows = 8;
// Blocks' ranges may begin anywhere; multiples of four keep results in whole sectors.
constexpr int kRowGranule = 4;
// What a block has besides its dynamic memory: JobState, and what the system takes.
constexpr size_t kOtherBytes = 4096 + 1024;

struct Plan {
  SmallBatch batch;
  int tiles_index = 0;  // of ProductKernels::small_batch
  int n_jobs = 0;
  size_t smem_bytes = 0;
  bool sum_after = false;  // products of every pair are kept and summed by another kernel
  int64_t n_staged = 0;    // rows of x, where a kernel before stages them
};

int tiles_index(int64_t n_rows) {
  return n_rows <= 8 ? 0 : n_rows <= 16 ? 1 : n_rows <= 32 ? 2 : 3;
}

// Rows that one block is likely to meet.
int64_t likely_rows(const Product& p, Jobs jobs) {
  if (jobs == Jobs::matrices) return p.rows_per_matrix();
  if (jobs != Jobs::experts) return 1;
  const int64_t twice_mean = 2 * p.n_rows() / std::max(p.n_experts, 1) + 1;
  return std::min(twice_mean, p.n_rows());
}

Jobs jobs_of(const Product& p) {
  if (!p.routed) return Jobs::matrices;
  if (p.extent[1] > 1) return Jobs::experts;
  return p.summed ? Jobs::sums : Jobs::pairs;
}

int n_jobs_of(const Product& p, Jobs jobs) {
  switch (jobs) {
    case Jobs::matrices:
      return p.n_matrices[0] * p.n_matrices[1];
    case Jobs::experts:
      return p.n_experts;
    case Jobs::sums:
      return p.extent[1];
    default:
      return static_cast<int>(p.n_rows());
  }
}

// Each multiprocessor gets as many blocks as fit, and they all have about as many rows.
void deal_rows(Plan& plan, const DeviceInfo& device) {
  const Product& p = plan.batch.product;
  const size_t of_sm = device.smem_per_block + 1024;
  const int per_sm = plan.tiles_index < 3 && 2 * (plan.smem_bytes + kOtherBytes) <= of_sm ? 2 : 1;
  int64_t busy_jobs = plan.n_jobs;
  if (plan.batch.jobs == Jobs::experts) busy_jobs = std::min(busy_jobs, p.n_rows());
  const int64_t per_job =
      std::max<int64_t>(device.n_sm * per_sm / std::max<int64_t>(busy_jobs, 1), 1);
  const int64_t rows = std::max<int64_t>((p.n + per_job - 1) / per_job, kMinBlockRows);
  plan.batch.rows_per_block =
      static_cast<int>((rows + kRowGranule - 1) / kRowGranule * kRowGranule);
  plan.batch.blocks_per_job = (p.n + plan.batch.rows_per_block - 1) / plan.batch.rows_per_block;
}

Plan make_plan(const Product& product, Finish finish, const DeviceInfo& device) {
  const ProductKernels& kernels = product_kernels(product.w.format);
  Plan plan;
  SmallBatch& b = plan.batch;
  b.product = product;
  b.finish = finish;
  b.jobs = jobs_of(product);
  plan.sum_after = product.summed && b.jobs == Jobs::experts;
  if (plan.sum_after) {
    b.product.summed = false;
    b.product.has_residual = false;
    b.product.n_slots = 1;
  }
  b.n_segments = product.swiglu ? 2 : b.jobs == Jobs::sums ? product.n_slots : 1;
  b.n_units = (product.k + kernels.unit - 1) / kernels.unit;
  b.split = split_of(b.n_units);
  b.pitch = staged_pitch(kernels.layout, product.k);
  plan.n_jobs = n_jobs_of(product, b.jobs);
  plan.tiles_index = tiles_index(likely_rows(product, b.jobs));

  const size_t ring = static_cast<size_t>(kSmallBatchWarps) * kernels.stage_bytes *
                      stages_of(kernels.stage_bytes, device.capability());
  const size_t parts =
      (product.swiglu ? 2u : 1u) * kSmallBatchWarps * 512u * (1u << plan.tiles_index);
  b.parts_at = static_cast<int>(ring);
  b.x_at = static_cast<int>(ring + parts);
  plan.smem_bytes = ring + parts;
  const int64_t own = b.jobs == Jobs::matrices ? product.rows_per_matrix() : b.n_segments;
  const size_t own_bytes = static_cast<size_t>(own) * static_cast<size_t>(b.pitch);
  if (b.jobs != Jobs::experts && own * product.k <= kMaxOwnElems &&
      plan.smem_bytes + own_bytes + kOtherBytes <= device.smem_per_block) {
    plan.smem_bytes += own_bytes;
  } else {
    plan.n_staged = product.slots_share_x() ? product.extent[1] : product.n_rows();
  }
  deal_rows(plan, device);
  return plan;
}

struct Memory {
  std::byte* staged = nullptr;
  float* scales = nullptr;
  float* products = nullptr;

  Memory(const Plan& plan, Room& room) {
    const Product& p = plan.batch.product;
    if (plan.n_staged > 0) {
      staged = room.take<std::byte>(plan.n_staged * plan.batch.pitch);
      scales = room.take<float>(plan.n_staged);
    }
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

}  // namespace

bool small_batch_fits(const Product& p, const DeviceInfo& device) {
  if (product_kernels(p.w.format).small_batch[0] == nullptr || p.k == 0 || p.w.transposed) {
    return false;
  }
  if (!readable_in_pieces(p.w, p.k)) return false;
  if (p.swiglu && (p.up.format != p.w.format || !readable_in_pieces(p.up, p.k))) return false;
  if (p.routed) {
    if (p.n_rows() > kMaxRoutedPairs || p.n_slots == 0 || p.n_slots > kMaxSlots) return false;
  } else if (p.rows_per_matrix() > kMaxSmallRows) {
    return false;
  }
  const Plan plan = make_plan(p, Finish::store, device);
  return plan.smem_bytes + kOtherBytes <= device.smem_per_block;
}

size_t small_batch_scratch_bytes(const Product& product, const DeviceInfo& device) {
  Room room(nullptr);
  Memory(make_plan(product, Finish::store, device), room);
  return room.used_bytes();
}

void run_small_batch(const CudaRun& run, const Product& product, Finish finish) {
  const ProductKernels& kernels = product_kernels(product.w.format);
  Plan plan = make_plan(product, finish, run.device);
  Room room(run.scratch);
  const Memory memory(plan, room);
  SmallBatch& b = plan.batch;
  const int64_t strides[4] = {product.x_stride[0], product.x_stride[1], product.x_stride[2],
                              product.x_step};
  b.fours = fours_are_aligned(product.x, product.x_format, strides);
  if (plan.n_staged > 0) {
    launch(run, kernels.stage_rows, dim3(static_cast<unsigned>(plan.n_staged)), dim3(256), 0,
           product, b.fours, memory.staged, memory.scales, b.pitch);
    b.staged = memory.staged;
    b.scales = memory.scales;
  }
  if (plan.sum_after) b.product.out = memory.products;
  launch(run, kernels.small_batch[plan.tiles_index],
         dim3(static_cast<unsigned>(plan.n_jobs) * static_cast<unsigned>(b.blocks_per_job)),
         dim3(kSmallBatchThreads), plan.smem_bytes, b);
  if (plan.sum_after) sum_slots(run, product, memory.products);
}

}  // namespace mla::cuda
