// out[t, :] = table[ids[t], :], decoded to float32.
#include "backends/cpu/ops/rows.h"
#include "base/error.h"

namespace mla::cpu {
namespace {

int64_t id_at(const Tensor& ids, int64_t t) {
  return *reinterpret_cast<const int32_t*>(ids.data + t * ids.stride[3]);
}

void run_get_rows(const Step& step, const CpuRun& run) {
  const Tensor& table = step.in[0];
  const Tensor& ids = step.in[1];
  const int64_t n_tokens = ids.shape.extent[3];
  const int64_t n_rows = table.shape.extent[2];
  for (int64_t t = 0; t < n_tokens; ++t) {
    const int64_t id = id_at(ids, t);
    MLA_CHECK_SHAPE(id >= 0 && id < n_rows, "get_rows: ids[", t, "] is ", id, ", accepted is 0 to ",
                    n_rows - 1);
  }
  const int64_t width = step.out.shape.extent[3];
  const bool is_float = !traits(table.format).quantized;
  for_items(run, n_tokens, 4 * width, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const std::byte* row = table.at(0, 0, id_at(ids, t));
      float* out = reinterpret_cast<float*>(step.out.at(0, 0, t));
      if (is_float) {
        run.kernels.row->to_f32(row, table.format, table.stride[3], width, out);
      } else {
        run.kernels.matmul->decode(table.format, row, width, out);
      }
    }
  });
}

}  // namespace

const CpuOp get_rows_op = {always, no_scratch, run_get_rows};

}  // namespace mla::cpu
