// Rows of latents and roped keys into their cells, in the cache's formats.
#include <algorithm>
#include <cstring>

#include "backends/cpu/ops/rows.h"
#include "base/error.h"

namespace mla::cpu {
namespace {

// Rows that are written side by side at most; a row takes well below a microsecond.
constexpr int64_t kMaxChunks = 32;

bool supports(const Node& node, const KernelTable&) {
  return node.input(0)->layout.rows_are_contiguous() && node.input(1)->layout.rows_are_contiguous();
}

size_t scratch_bytes(const Node& node, const KernelTable&, int n_threads) {
  return row_scratch_bytes(std::max(node.input(2)->dim(1), node.input(3)->dim(1)), 1, n_threads);
}

int32_t cell_at(const Tensor& cells, int64_t token) {
  int32_t cell;
  std::memcpy(&cell, cells.data + token * cells.stride[3], sizeof cell);
  return cell;
}

void write_row(const CpuRun& run, const Tensor& plane, int64_t cell, const Tensor& rows,
               int64_t token, float* room) {
  const int64_t n = plane.dim(1);
  const float* in = as_f32(run, rows.at(0, 0, token), rows, n, room);
  std::byte* out = plane.at(0, 0, cell);
  if (plane.format == Format::Q8_0) {
    run.kernels.row->encode_q8_0(in, n, out);
  } else {
    run.kernels.row->from_f32(in, n, plane.format, out);
  }
}

void run_cache_write(const Step& step, const CpuRun& run) {
  const auto& [latent_plane, rope_plane, latent, rope, cells, unused1, unused2, unused3] = step.in;
  const int64_t n_cells = latent_plane.dim(0);
  const int64_t n_tokens = latent.dim(0);
  for (int64_t t = 0; t < n_tokens; ++t) {
    MLA_CHECK_SHAPE(cell_at(cells, t) < n_cells, "cache_write: cells[", t, "] is ",
                    cell_at(cells, t), ", the cache has ", n_cells, " cells");
  }
  const int64_t room = std::max(latent.dim(1), rope.dim(1));
  // A chunk writes the cells that are its number modulo n_chunks, in the order of the tokens: two
  // rows for one cell meet in one chunk, and the last one stays.
  const int64_t n_chunks = std::clamp<int64_t>(n_tokens / 16, 1, kMaxChunks);
  const auto write = [&](int64_t chunk, int thread) {
    float* row = row_scratch(run, room, 1, thread);
    for (int64_t t = 0; t < n_tokens; ++t) {
      const int64_t cell = cell_at(cells, t);
      if (cell < 0 || cell % n_chunks != chunk) continue;
      write_row(run, latent_plane, cell, latent, t, row);
      write_row(run, rope_plane, cell, rope, t, row);
    }
  };
  if (n_chunks == 1) {
    write(0, 0);
  } else {
    run.pool.parallel_for(n_chunks, write);
  }
}

}  // namespace

const CpuOp cache_write_op = {supports, scratch_bytes, run_cache_write};

}  // namespace mla::cpu
