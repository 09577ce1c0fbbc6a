// The k largest numbers of each row, where they are, and the sum of e^(x - the largest).
//
// Falling order; ties go to the lower id, NaN is below -inf. A heap of the best so far has the
// worst of them on top: nearly all numbers are compared with that one and dropped.
#include <algorithm>
#include <functional>

#include "backends/cpu/ops/rows.h"
#include "base/order.h"

namespace mla::cpu {
namespace {

// Of one thread: the best so far and, unless its numbers lie side by side, the row.
size_t room_bytes(const Layout& logits, int64_t k) {
  const int64_t n = logits.stride[3] == sizeof(float) ? 0 : logits.shape.extent[3];
  return static_cast<size_t>(k) * sizeof(uint64_t) + static_cast<size_t>(n + n % 2) * sizeof(float);
}

size_t scratch_bytes(const Node& node, const KernelTable&, int n_threads) {
  return room_bytes(node.input(0)->layout, node.attr<TopKAttrs>().k) *
         static_cast<size_t>(n_threads);
}

// best[k] becomes the choice_keys of the row's largest, falling.
void choose(const float* row, int64_t n, uint64_t* best, int64_t k) {
  for (int64_t i = 0; i < k; ++i) {
    best[i] = choice_key(row[i], static_cast<uint32_t>(i));
  }
  std::make_heap(best, best + k, std::greater<>());
  float worst = row[chosen_id(best[0])];
  for (int64_t i = k; i < n; ++i) {
    const float value = row[i];
    if (value <= worst) continue;  // an equal one came earlier
    const uint64_t key = choice_key(value, static_cast<uint32_t>(i));
    if (key < best[0]) continue;  // NaN on one side
    std::pop_heap(best, best + k, std::greater<>());
    best[k - 1] = key;
    std::push_heap(best, best + k, std::greater<>());
    worst = row[chosen_id(best[0])];
  }
  std::sort_heap(best, best + k, std::greater<>());
}

void run_top_k(const Step& step, const CpuRun& run) {
  const Tensor& logits = step.in[0];
  const int64_t k = step.node->attr<TopKAttrs>().k;
  const int64_t n = logits.shape.extent[3];
  auto body = [&](int64_t begin, int64_t end, int thread) {
    std::byte* room = run.scratch + static_cast<size_t>(thread) * room_bytes(logits, k);
    auto* best = reinterpret_cast<uint64_t*>(room);
    for (int64_t row = begin; row < end; ++row) {
      const float* x =
          as_f32(run, logits.at(0, 0, row), logits, n, reinterpret_cast<float*>(best + k));
      choose(x, n, best, k);
      auto* ids = reinterpret_cast<int32_t*>(step.out.at(0, 0, row));
      auto* values = reinterpret_cast<float*>(ids + k);
      for (int64_t i = 0; i < k; ++i) {
        ids[i] = static_cast<int32_t>(chosen_id(best[i]));
        values[i] = x[ids[i]];
      }
      values[k] = static_cast<float>(run.kernels.row->exp_sum(x, values[0], n));
    }
  };
  // A comparison and an exponential cost about as much as streaming 8 numbers.
  for_items(run, logits.shape.extent[2], 8 * row_bytes(Format::F32, n), body);
}

}  // namespace

const CpuOp top_k_op = {always, scratch_bytes, run_top_k};

}  // namespace mla::cpu
