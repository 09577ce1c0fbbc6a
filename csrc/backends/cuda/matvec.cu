// Which products of one row run on matvec.cuh, and on how many blocks.
#include "backends/cuda/matvec.h"

#include <algorithm>

#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/product_kernels.h"

namespace mla::cuda {
namespace {

// Two blocks of at most 85 registers a thread leave a third of a multiprocessor to those of the
// next kernel.
constexpr int kBlocksPerSm = 2;
constexpr size_t kMostStaged = size_t{96} << 10;

bool takes_quantized(const Weight& w) {
  return traits(w.format).quantized && !w.transposed && w.row_stride >= 0;
}

int rows_of_x(const Product& p) { return p.routed && !p.slots_share_x() ? p.extent[2] : 1; }

}  // namespace

bool matvec_fits(const Product& p, const DeviceInfo& device) {
  if (p.k == 0 || !takes_quantized(p.w)) return false;
  if (p.swiglu && (p.up.format != p.w.format || !takes_quantized(p.up))) return false;
  if (p.extent[0] != 1 || p.extent[1] != 1 || (p.routed ? p.extent[2] == 0 : p.extent[2] != 1)) {
    return false;
  }
  if (p.n_matrices[0] * p.n_matrices[1] != 1 && !p.routed) return false;
  const size_t staged = static_cast<size_t>(rows_of_x(p)) * static_cast<size_t>(staged_bytes(p.k));
  return staged <= std::min(kMostStaged, device.smem_per_block);
}

void run_matvec(const CudaRun& run, const Product& p, Finish finish) {
  const ProductKernels& kernels = product_kernels(p.w.format);
  const int64_t n_blocks = p.k / traits(p.w.format).block_elems;
  MatVec m;
  m.product = p;
  m.finish = finish;
  const int64_t strides[4] = {p.x_stride[0], p.x_stride[1], p.x_stride[2], p.x_step};
  m.fours = fours_are_aligned(p.x, p.x_format, strides);
  m.n_x = rows_of_x(p);
  m.items_per_slot = p.swiglu ? p.n : (p.n + 1) / 2;
  m.n_items = m.items_per_slot * (p.routed && !p.summed ? p.extent[2] : 1);
  m.n_pieces = static_cast<int>(n_blocks) * kernels.block_pieces;
  m.planes = kernels.planes_at(n_blocks);
  const int most = kBlocksPerSm * run.device.n_sm;
  const int blocks = std::min((m.n_items + kMatVecWarps - 1) / kMatVecWarps, most);
  launch(run, kernels.matvec, dim3(static_cast<unsigned>(blocks)), dim3(kMatVecThreads),
         static_cast<size_t>(m.n_x) * static_cast<size_t>(staged_bytes(p.k)), m);
}

}  // namespace mla::cuda
