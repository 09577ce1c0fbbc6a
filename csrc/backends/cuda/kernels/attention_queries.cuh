// Queries of absorbed attention, once per token:
//
//   q[t, h, 0..C)            = f * sum_n q_nope[t, h, n] k_b[h, c, n]
//   q[t, h, 512..512 + R)    = f * q_rope[t, h]             f = scale * log2(e), for 2^x later
//
// summed in float32, rounded once to the type of the operands; dims that a model lacks are zero.
// Grid [H * slabs, token tiles]: a slab is a few columns (the last one: rope), a tile kTileTokens
// tokens. With more spans than a warp has lanes, one block more, (0, 0), lists the work. Weights
// are decoded into registers before the kernel waits for the ones ahead: they are constants, and
// most of the bytes. Error: half a unit of the operand's type; scores err by 2^-11 |q||k| / sqrt(C)
// (f16).
#pragma once

#include "backends/cuda/kernels/attention_operand.cuh"
#include "backends/cuda/kernels/attention_schedule.cuh"
#include "backends/cuda/kernels/attention_weights.cuh"
#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/kernels/math.cuh"

namespace mla::cuda {

inline constexpr int kProductThreads = 256;
inline constexpr int kProductWarps = kProductThreads / 32;
inline constexpr int kTileTokens = kProductWarps;  // one warp looks up, or merges, one token
// A group of 32 floats takes 36 in shared memory: lanes that read groups side by side, 16 bytes
// each, then meet different banks.
inline constexpr int kGroupPitch = kGroup + 4;

__host__ __device__ inline int n_groups(int k) { return (k + kGroup - 1) / kGroup; }

// Lanes that share a row of k, one group each: a power of two, at most 32.
__host__ __device__ inline int lanes_per_row(int k) {
  int lanes = 1;
  while (lanes * kGroup < k && lanes < 32) lanes *= 2;
  return lanes;
}
__host__ __device__ inline int rows_at_a_time(int k) { return kProductThreads / lanes_per_row(k); }

// The dot product of a lane's group with one of shared memory.
__device__ inline float dot_group(const float (&w)[kGroup], const float* x) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kGroup; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(x + i);
    sum = fmaf(w[i], v.x, sum);
    sum = fmaf(w[i + 1], v.y, sum);
    sum = fmaf(w[i + 2], v.z, sum);
    sum = fmaf(w[i + 3], v.w, sum);
  }
  return sum;
}

// The queries need nothing of a write to the cache: beside one they wait at their end.
__device__ inline void queries_begin(const AttentionArgs& a) {
  a.queries_wait_last ? pdl_release() : pdl_wait();
}
__device__ inline void queries_end(const AttentionArgs& a) {
  if (a.queries_wait_last) pdl_wait();
}

struct QueryTile {
  int head, slab;
  int first, n;  // tokens
  float factor;

  // Of the window's queries: row of token i.
  template <class T>
  __device__ T* row(const AttentionArgs& a, const AbsorbedPlan& plan, int i) const {
    const int64_t row = int64_t{first + i - plan.first_token} * a.h + head;
    return reinterpret_cast<T*>(plan.q) + row * kKeyDims;
  }
};

__device__ inline QueryTile query_tile(const AttentionArgs& a, const AbsorbedPlan& plan,
                                       int n_slabs) {
  QueryTile tile;
  const int block = static_cast<int>(blockIdx.x) - (warps_list(a) ? 0 : 1);
  tile.head = block / n_slabs;
  tile.slab = block % n_slabs;
  tile.first = plan.first_token + static_cast<int>(blockIdx.y) * kTileTokens;
  tile.n = min(kTileTokens, plan.end_token - tile.first);
  tile.factor = a.scale * 1.44269504088896341f;
  return tile;
}

// Dim d of a head's roped query.
__device__ inline float roped_value(const AttentionArgs& a, int token, int head, int d) {
  const float x = query_value(a.q_rope, token, head, d);
  const QueryRotation& r = a.rotation;
  if (r.positions == nullptr) return x;
  const auto position = *reinterpret_cast<const int32_t*>(r.positions + token * r.position_stride);
  const float frequency = load_element(r.frequencies + d / 2 * r.frequency_stride, Format::F32);
  const Rotation turn = rotation(position, frequency, r.scale);
  const float y = query_value(a.q_rope, token, head, d ^ 1);
  return d % 2 == 0 ? x * turn.cosine - y * turn.sine : x * turn.cosine + y * turn.sine;
}

// Block (0, *) of long lists: true where there is nothing else to do.
__device__ inline bool lists_work(const AttentionArgs& a, const AbsorbedPlan& plan) {
  if (blockIdx.x != 0 || warps_list(a)) return false;
  pdl_wait();
  if (blockIdx.y != 0) return true;
  if (threadIdx.x < 32) list_work(a, plan);
  list_tokens(a, plan);
  return true;
}

// Which tokens of the tile are absorbed: one warp each. wanted: shared, [kTileTokens].
__device__ inline void find_wanted(const AttentionArgs& a, const QueryTile& tile, bool* wanted) {
  const int i = static_cast<int>(threadIdx.x) / 32;
  if (i < kTileTokens) {
    bool is = false;
    if (i < tile.n) {
      const int span = find_span(a, tile.first + i);
      is = span >= 0 && load_span(a, span).span.expanded == 0;
    }
    if (threadIdx.x % 32 == 0) wanted[i] = is;
  }
}

// The slab after the last: rope parts, and zeros where the model is narrower than the tiles.
template <class T>
__device__ void finish_queries(const AttentionArgs& a, const AbsorbedPlan& plan,
                               const QueryTile& tile) {
  for (int i = 0; i < tile.n; ++i) {
    T* row = tile.row<T>(a, plan, i);
    for (int d = threadIdx.x; d < kRopeDims; d += kProductThreads) {
      const float x = d < a.r ? roped_value(a, tile.first + i, tile.head, d) : 0.0f;
      row[kLatentDims + d] = to_operand<T>(tile.factor * x);
    }
    for (int d = a.c + threadIdx.x; d < kLatentDims; d += kProductThreads) {
      row[d] = to_operand<T>(0.0f);
    }
  }
}

// The dot product of a lane's group with that of a lone token's query, straight from memory: no
// barrier between the two. Whether the token is absorbed does not matter: nobody reads it then.
__device__ inline float dot_query(const AttentionArgs& a, const QueryTile& tile, int group,
                                  const float (&w)[kGroup]) {
  const auto* x = reinterpret_cast<const float4*>(a.q_nope.data + tile.first * a.q_nope.stride[1] +
                                                  tile.head * a.q_nope.stride[2]);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kGroup / 4; ++i) {
    const float4 v = x[group * (kGroup / 4) + i];
    sum = fmaf(w[4 * i], v.x, sum);
    sum = fmaf(w[4 * i + 1], v.y, sum);
    sum = fmaf(w[4 * i + 2], v.z, sum);
    sum = fmaf(w[4 * i + 3], v.w, sum);
  }
  return sum;
}

// k_b [H, C, N]: rows are contracted along themselves. A slab is rows_at_a_time(N) columns.
template <Format F, class T>
__global__ void __launch_bounds__(kProductThreads, 3)
    queries_along(const __grid_constant__ AttentionArgs a,
                  const __grid_constant__ AbsorbedPlan plan, int n_slabs) {
  if (lists_work(a, plan)) return;
  float* q = dynamic_smem<float>();  // [kTileTokens][groups][kGroupPitch]
  __shared__ bool wanted[kTileTokens];
  const QueryTile tile = query_tile(a, plan, n_slabs);
  if (tile.slab == n_slabs - 1) {
    queries_begin(a);
    finish_queries<T>(a, plan, tile);
    return queries_end(a);
  }
  const int lanes = lanes_per_row(a.n);
  const int group = static_cast<int>(threadIdx.x) % lanes;
  const int c = tile.slab * rows_at_a_time(a.n) + static_cast<int>(threadIdx.x) / lanes;
  const bool works = c < a.c && group < n_groups(a.n);
  float w[kGroup] = {};
  if (works) {
    const std::byte* row = a.k_b.data + tile.head * a.k_b.stride[1] + c * a.k_b.stride[2];
    weight_group<F>(row, a.n, group, w);
  }
  if (plan.end_token - plan.first_token == 1 && a.q_fours) {
    queries_begin(a);
    float sum = works ? dot_query(a, tile, group, w) : 0.0f;
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (works && group == 0) tile.row<T>(a, plan, 0)[c] = to_operand<T>(tile.factor * sum);
    return queries_end(a);
  }
  if (!a.spans_given) queries_begin(a);
  find_wanted(a, tile, wanted);
  queries_begin(a);
  const int padded = n_groups(a.n) * kGroup;
  for (int at = threadIdx.x; at < tile.n * padded; at += kProductThreads) {
    const int i = at / padded, d = at % padded;
    q[(i * n_groups(a.n) + d / kGroup) * kGroupPitch + d % kGroup] =
        d < a.n ? query_value(a.q_nope, tile.first + i, tile.head, d) : 0.0f;
  }
  __syncthreads();
  for (int i = 0; i < tile.n; ++i) {
    if (!wanted[i]) continue;
    float sum = 0.0f;
    if (works) sum = dot_group(w, q + (i * n_groups(a.n) + group) * kGroupPitch);
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (works && group == 0) tile.row<T>(a, plan, i)[c] = to_operand<T>(tile.factor * sum);
  }
  queries_end(a);
}

// k_b [H, N, C]: rows are contracted across. A slab is one group of 32 columns; the rows' numbers
// go through shared memory, kProductThreads rows at a time.
template <Format F, class T>
__global__ void __launch_bounds__(kProductThreads)
    queries_across(const __grid_constant__ AttentionArgs a,
                   const __grid_constant__ AbsorbedPlan plan, int n_slabs) {
  constexpr int kPitch = kGroup + 1;  // a row per thread on the way in, a column on the way out
  if (lists_work(a, plan)) return;
  float* w = dynamic_smem<float>();         // [kProductThreads][kPitch]; at the end partial sums
  float* q = w + kProductThreads * kPitch;  // [kTileTokens][N]
  __shared__ bool wanted[kTileTokens];
  const QueryTile tile = query_tile(a, plan, n_slabs);
  if (tile.slab == n_slabs - 1) {
    queries_begin(a);
    finish_queries<T>(a, plan, tile);
    return queries_end(a);
  }
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const auto decode_rows = [&](int first) {
    const int n = first + static_cast<int>(threadIdx.x);
    float value[kGroup] = {};
    if (n < a.n) {
      const std::byte* row = a.k_b.data + tile.head * a.k_b.stride[1] + n * a.k_b.stride[2];
      weight_group<F>(row, a.c, tile.slab, value);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) w[threadIdx.x * kPitch + i] = value[i];
  };
  decode_rows(0);
  if (!a.spans_given) queries_begin(a);
  find_wanted(a, tile, wanted);
  queries_begin(a);
  for (int at = threadIdx.x; at < tile.n * a.n; at += kProductThreads) {
    q[at] = query_value(a.q_nope, tile.first + at / a.n, tile.head, at % a.n);
  }
  __syncthreads();
  float sum[kTileTokens] = {};
  for (int first = 0; first < a.n; first += kProductThreads) {
    if (first > 0) {
      __syncthreads();
      decode_rows(first);
      __syncthreads();
    }
    const int rows = min(kProductThreads, a.n - first);
    for (int n = warp; n < rows; n += kProductWarps) {
      const float weight = w[n * kPitch + lane];
#pragma unroll
      for (int i = 0; i < kTileTokens; ++i) {
        if (i < tile.n) sum[i] = fmaf(weight, q[i * a.n + first + n], sum[i]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTileTokens; ++i) w[(warp * kTileTokens + i) * kGroup + lane] = sum[i];
  __syncthreads();
  queries_end(a);
  if (warp >= tile.n || !wanted[warp]) return;
  float total = 0.0f;
  for (int from = 0; from < kProductWarps; ++from) {
    total += w[(from * kTileTokens + warp) * kGroup + lane];
  }
  const int c = tile.slab * kGroup + lane;
  if (c < a.c) tile.row<T>(a, plan, warp)[c] = to_operand<T>(tile.factor * total);
}

}  // namespace mla::cuda
