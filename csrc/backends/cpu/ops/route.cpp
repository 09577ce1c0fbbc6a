// The experts of each token and their weights.
//
// score = softmax(logits) or sigmoid(logits); choice = score + bias. Groups of consecutive experts
// are ranked by their best choice or the sum of their two best; outside the best groups nothing is
// chosen. The n_used best choices win, in falling order; their weights are the scores without
// bias, divided by their sum (+ 1e-20) if normalized, times the scale.
// Order is total: ties go to the lower id, NaN is below -inf.
#include <limits>

#include "backends/cpu/ops/rows.h"
#include "base/order.h"

namespace mla::cpu {
namespace {

// The best candidates so far, in falling order; offered with rising ids.
struct Best {
  int32_t* ids;
  uint32_t* keys;
  int64_t capacity;
  int64_t size = 0;

  void offer(int32_t id, uint32_t key) {
    if (size == capacity && key <= keys[size - 1]) return;
    int64_t at = size < capacity ? size++ : size - 1;
    for (; at > 0 && keys[at - 1] < key; --at) {
      keys[at] = keys[at - 1];
      ids[at] = ids[at - 1];
    }
    keys[at] = key;
    ids[at] = id;
  }
};

// Rows of one thread's scratch.
struct Room {
  float* logits;   // [E]
  float* scores;   // [E] weights come from here
  float* choices;  // [E] scores + bias
  uint32_t* keys;  // [E]
  int32_t* group_ids;
  uint8_t* group_used;
};
constexpr int kRoomRows = 6;

Room room_of(const CpuRun& run, int64_t n_experts, int thread) {
  float* base = row_scratch(run, n_experts, kRoomRows, thread);
  return {base,
          base + n_experts,
          base + 2 * n_experts,
          reinterpret_cast<uint32_t*>(base + 3 * n_experts),
          reinterpret_cast<int32_t*>(base + 4 * n_experts),
          reinterpret_cast<uint8_t*>(base + 5 * n_experts)};
}

float group_score(const float* choices, int64_t n, GroupScore rule) {
  const float lowest = -std::numeric_limits<float>::infinity();
  float first = lowest;
  float second = lowest;
  for (int64_t i = 0; i < n; ++i) {
    if (choices[i] > first) {
      second = first;
      first = choices[i];
    } else if (choices[i] > second) {
      second = choices[i];
    }
  }
  return rule == GroupScore::max ? first : first + second;
}

void choose_groups(const RouteAttrs& a, int64_t per_group, const Room& room) {
  Best best{room.group_ids, room.keys, a.n_groups_used};
  for (int group = 0; group < a.n_groups; ++group) {
    const float score = group_score(room.choices + group * per_group, per_group, a.group_score);
    best.offer(group, order_key(score));
    room.group_used[group] = 0;
  }
  for (int64_t i = 0; i < best.size; ++i) room.group_used[room.group_ids[i]] = 1;
}

void choose_experts(const RouteAttrs& a, int64_t n_experts, const Room& room, int32_t* ids) {
  const int64_t per_group = n_experts / a.n_groups;
  choose_groups(a, per_group, room);
  Best best{ids, room.keys, a.n_used};
  for (int group = 0; group < a.n_groups; ++group) {
    if (room.group_used[group] == 0) continue;
    for (int64_t e = group * per_group; e < (group + 1) * per_group; ++e) {
      best.offer(static_cast<int32_t>(e), order_key(room.choices[e]));
    }
  }
}

void write_weights(const RouteAttrs& a, const float* scores, const int32_t* ids, float* weights) {
  float divisor = 1.0f;
  if (a.normalize) {
    float sum = 0.0f;
    for (int i = 0; i < a.n_used; ++i) sum += scores[ids[i]];
    divisor = sum + 1e-20f;
  }
  for (int i = 0; i < a.n_used; ++i) weights[i] = scores[ids[i]] / divisor * a.scale;
}

size_t scratch_bytes(const Node& node, const KernelTable&, int n_threads) {
  // One more row for the bias, shared by all.
  const int64_t n_experts = node.input(0)->dim(-1);
  return row_scratch_bytes(n_experts, kRoomRows, n_threads) + row_scratch_bytes(n_experts, 1, 1);
}

void run_route(const Step& step, const CpuRun& run) {
  const Tensor& logits = step.in[0];
  const Tensor& bias = step.in[1];
  const auto& a = step.node->attr<RouteAttrs>();
  const int64_t n_experts = logits.shape.extent[3];
  const RowTable& kernels = *run.kernels.row;
  const float* offset = nullptr;
  if (bias.data != nullptr) {
    float* shared = row_scratch(run, n_experts, kRoomRows, run.pool.n_threads());
    offset = as_f32(run, bias.data, bias, n_experts, shared);
  }
  auto body = [&](int64_t begin, int64_t end, int thread) {
    Room room = room_of(run, n_experts, thread);
    float* const biased = room.choices;
    for (int64_t t = begin; t < end; ++t) {
      const float* row = as_f32(run, row_at(logits, t), logits, n_experts, room.logits);
      if (a.gating == Gating::softmax) {
        kernels.softmax(row, nullptr, 1.0f, n_experts, room.scores);
      } else {
        kernels.sigmoid(row, n_experts, room.scores);
      }
      room.choices = offset != nullptr ? biased : room.scores;
      if (offset != nullptr) kernels.add(room.scores, offset, n_experts, biased);
      auto* ids = reinterpret_cast<int32_t*>(step.out.at(0, t, 0));
      choose_experts(a, n_experts, room, ids);
      write_weights(a, room.scores, ids, reinterpret_cast<float*>(step.out.at(0, t, 1)));
    }
  };
  // Several passes over each row: a token costs about as much as streaming 8 rows.
  for_items(run, logits.shape.extent[2], 8 * row_bytes(Format::F32, n_experts), body);
}

}  // namespace

const CpuOp route_op = {always, scratch_bytes, run_route};

}  // namespace mla::cpu
