// The experts of each token and their weights; the rule is in graph/node.h (RouteAttrs).
//
//   logits [T, E], bias [E] or null -> I32 [T, 2, A]: ids, then the bits of the weights
//
// A warp has a token: lane l holds experts l, l + 32, ... Scores and choices also lie in shared
// memory, where groups are ranked. Every number is computed by the CPU's formulas in float32, so
// that equal logits give equal choices; sums run in a fixed order, so that runs are alike.
// Order is total: ties go to the lower id, NaN is below -inf.
#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/kernels/math.cuh"
#include "backends/cuda/ops/ops.h"
#include "base/order.h"

namespace mla::cuda {
namespace {

constexpr int kWarps = 4;  // tokens of a block: at 512 experts 4 * 8 KiB of shared memory at most
constexpr int kMaxExperts = 512;

struct Route {
  const std::byte *logits, *bias;
  int64_t token_stride, logit_stride, bias_stride;
  int32_t* out;
  int64_t n_tokens;
  int n_experts;
  bool bias_is_constant;  // may be read before earlier kernels have ended
  RouteAttrs attrs;
};

// What a warp keeps in shared memory.
struct Room {
  float* scores;   // [E] weights come from here
  float* choices;  // [E] scores + bias
  uint32_t* keys;  // [groups] order_key of their scores
  uint32_t* used;  // [groups]
  int32_t* ids;    // [A]
};
__host__ __device__ int room_words(int n_experts, const RouteAttrs& a) {
  return 2 * n_experts + 2 * a.n_groups + a.n_used;
}
__device__ Room room_of(const Route& r) {
  float* base = dynamic_smem<float>() + warp_id() * room_words(r.n_experts, r.attrs);
  auto* keys = reinterpret_cast<uint32_t*>(base + 2 * r.n_experts);
  uint32_t* used = keys + r.attrs.n_groups;
  return {base, base + r.n_experts, keys, used,
          reinterpret_cast<int32_t*>(used + r.attrs.n_groups)};
}

template <int kPerLane>
__device__ void load_row(const std::byte* row, int64_t stride, int n, float (&x)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = 32 * i + lane_id();
    x[i] = e < n ? load_element(row + e * stride, Format::F32) : -INFINITY;
  }
}

// Logits to scores, in place; zeros past the end.
template <int kPerLane>
__device__ void softmax_row(float (&x)[kPerLane]) {
  float largest = -INFINITY;
#pragma unroll
  for (float value : x) largest = fmaxf(largest, value);
  largest = warp_max(largest);
  const float shift = largest == -INFINITY ? 0.0f : largest;
  double sum = 0;
#pragma unroll
  for (float& value : x) {
    value = exp_exact(value - shift);
    sum += value;
  }
  for (int step = kWarpThreads / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  const float inverse = sum == 0 ? 0.0f : static_cast<float>(1.0 / sum);
#pragma unroll
  for (float& value : x) value = __fmul_rn(value, inverse);  // the bias is not fused with it
}

struct BestTwo {
  float first = -INFINITY, second = -INFINITY;
  __device__ void offer(float x) {  // NaN changes nothing
    if (x > first) {
      second = first;
      first = x;
    } else if (x > second) {
      second = x;
    }
  }
};

// Marks the groups that experts may come from.
__device__ void choose_groups(const Route& r, const Room& room) {
  const int n_groups = r.attrs.n_groups;
  const int per_group = r.n_experts / n_groups;
  int lanes = 1;  // of a group
  while (2 * lanes * n_groups <= kWarpThreads) lanes *= 2;
  for (int first = 0; first < n_groups; first += kWarpThreads / lanes) {
    const int group = first + lane_id() / lanes;
    BestTwo best;
    for (int i = lane_id() % lanes; i < per_group && group < n_groups; i += lanes) {
      best.offer(room.choices[group * per_group + i]);
    }
    for (int step = lanes / 2; step > 0; step /= 2) {
      const float other_first = __shfl_xor_sync(kAllLanes, best.first, step);
      const float other_second = __shfl_xor_sync(kAllLanes, best.second, step);
      best.second = fmaxf(fminf(best.first, other_first), fmaxf(best.second, other_second));
      best.first = fmaxf(best.first, other_first);
    }
    if (lane_id() % lanes == 0 && group < n_groups) {
      const bool is_max = r.attrs.group_score == GroupScore::max;
      room.keys[group] = order_key(is_max ? best.first : best.first + best.second);
    }
  }
  __syncwarp();
  for (int group = lane_id(); group < n_groups; group += kWarpThreads) {
    const uint32_t key = room.keys[group];
    int n_better = 0;
    for (int other = 0; other < n_groups; ++other) {
      n_better += room.keys[other] > key || (room.keys[other] == key && other < group);
    }
    room.used[group] = n_better < r.attrs.n_groups_used;
  }
  __syncwarp();
}

// The best of all keys, again and again; 0 is no candidate. Returns the sum of the chosen scores.
template <int kPerLane>
__device__ float choose_experts(const Route& r, const Room& room, uint32_t (&keys)[kPerLane]) {
  float sum = 0.0f;
  for (int a = 0; a < r.attrs.n_used; ++a) {
    uint32_t best = 0;
    uint32_t id = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (keys[i] > best) {
        best = keys[i];
        id = 32 * i + lane_id();
      }
    }
    const bool leads = best == warp_max(best);
    id = ~warp_max(leads ? ~id : 0u);  // of equal ones the lowest
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (static_cast<uint32_t>(32 * i + lane_id()) == id) keys[i] = 0;
    }
    if (lane_id() == 0) room.ids[a] = static_cast<int32_t>(id);
    sum += room.scores[id];
  }
  __syncwarp();
  return sum;
}

__device__ void write_result(const Route& r, const Room& room, int64_t token, float sum) {
  const int n_used = r.attrs.n_used;
  int32_t* ids = r.out + token * 2 * n_used;
  auto* weights = reinterpret_cast<float*>(ids + n_used);
  const float divisor = r.attrs.normalize ? sum + 1e-20f : 1.0f;
  for (int a = lane_id(); a < n_used; a += kWarpThreads) {
    ids[a] = room.ids[a];
    weights[a] = room.scores[room.ids[a]] / divisor * r.attrs.scale;
  }
}

template <int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpThreads) route_kernel(Route r) {
  if (!r.bias_is_constant) pdl_wait();
  float bias[kPerLane] = {};
  if (r.bias != nullptr) load_row(r.bias, r.bias_stride, r.n_experts, bias);
  if (r.bias_is_constant) pdl_wait();
  const int64_t token = int64_t{blockIdx.x} * kWarps + warp_id();
  if (token >= r.n_tokens) return;  // whole warps; there is no barrier of the block
  const Room room = room_of(r);
  float x[kPerLane];
  load_row(r.logits + token * r.token_stride, r.logit_stride, r.n_experts, x);
  if (r.attrs.gating == Gating::softmax) {
    softmax_row(x);
  } else {
#pragma unroll
    for (float& value : x) value = sigmoid_exact(value);
  }
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = 32 * i + lane_id();
    keys[i] = 0;
    if (e >= r.n_experts) continue;
    const float choice = r.bias != nullptr ? x[i] + bias[i] : x[i];
    keys[i] = order_key(choice);
    room.scores[e] = x[i];
    room.choices[e] = choice;
  }
  __syncwarp();
  if (r.attrs.n_groups > 1) {
    choose_groups(r, room);
    const int per_group = r.n_experts / r.attrs.n_groups;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = 32 * i + lane_id();
      if (e < r.n_experts && room.used[e / per_group] == 0) keys[i] = 0;
    }
  }
  write_result(r, room, token, choose_experts(r, room, keys));
}

std::string_view refusal(const Node& node, const DeviceInfo&) {
  return node.input(0)->dim(-1) <= kMaxExperts ? "" : "more than 512 experts";
}

void run_route(const Step& step, const CudaRun& run) {
  const Tensor& logits = step.in[0];
  const Tensor& bias = step.in[1];
  Route r = {};
  r.attrs = step.node->attr<RouteAttrs>();
  r.logits = logits.data;
  r.token_stride = logits.stride[2];
  r.logit_stride = logits.stride[3];
  r.bias = bias.data;
  r.bias_stride = bias.stride[3];
  r.bias_is_constant = bias.data != nullptr && root_of(step.node->input(1)).node->op == Op::weight;
  r.out = step.out.ptr<int32_t>();
  r.n_tokens = logits.shape.extent[2];
  r.n_experts = static_cast<int>(logits.shape.extent[3]);
  const dim3 grid(static_cast<unsigned>((r.n_tokens + kWarps - 1) / kWarps));
  const dim3 block(kWarps * kWarpThreads);
  const size_t smem =
      sizeof(float) * static_cast<size_t>(kWarps * room_words(r.n_experts, r.attrs));
  if (r.n_experts <= 64) {
    launch(run, route_kernel<2>, grid, block, smem, r);
  } else if (r.n_experts <= 256) {
    launch(run, route_kernel<8>, grid, block, smem, r);
  } else {
    launch(run, route_kernel<kMaxExperts / kWarpThreads>, grid, block, smem, r);
  }
}

}  // namespace

const CudaOp route_op = {refusal, no_scratch, run_route};

}  // namespace mla::cuda
