// Attention in float32, one block per head and few tokens: the measure that the fast kernels are
// held against, and what runs where these do not fit.
//
//   absorbed  q' = q_nope k_b,  s = scale (q' c + q_rope k_rope),  out = (softmax(s) c) v_b
//   expanded  k = c k_b^T, v = c v_b^T of every cell,  s = scale (q_nope k + q_rope k_rope),
//             out = softmax(s) v
//
// The tokens of a block are cut at the ends of spans; a piece goes through its cells kExactCells at
// a time with a running softmax. Every number depends on its own token and span alone, so a batch
// gives the bits that each sequence gives alone.
// Error: sums of float32 in fixed order, nmse below 1e-11 for contexts of thousands.
#pragma once

#include "backends/cuda/kernels/attention_common.cuh"
#include "backends/cuda/kernels/math.cuh"

namespace mla::cuda {

// With C = 512, R = 64, N = V = 128 these sizes take 44 KB of shared memory, which every device
// has without asking.
inline constexpr int kExactTokens = 4;
inline constexpr int kExactCells = 8;
inline constexpr int kExactThreads = 128;

// Weights of heads [first_head, first_head + n_heads), decoded.
struct ExactHeads {
  const float* k_b;  // [n_heads, C, N] or, transposed, [n_heads, N, C]
  const float* v_b;  // [n_heads, V, C]
  int first_head, n_heads;
};

// Floats of shared memory, in the order they lie there.
struct ExactLayout {
  int q_row, acc_row, cell_row;  // lengths of rows
  int q, acc, cells, keys, values, scores, stats, size;
};
__host__ __device__ inline ExactLayout exact_layout(const AttentionArgs& a) {
  ExactLayout l = {};
  l.q_row = (a.c > a.n ? a.c : a.n) + a.r;
  l.acc_row = a.c > a.v ? a.c : a.v;
  l.cell_row = a.c + a.r;
  l.acc = l.q + kExactTokens * l.q_row;
  l.cells = l.acc + kExactTokens * l.acc_row;
  l.keys = l.cells + kExactCells * l.cell_row;
  l.values = l.keys + kExactCells * a.n;
  l.scores = l.values + kExactCells * a.v;
  l.stats = l.scores + kExactTokens * kExactCells;
  l.size = l.stats + 3 * kExactTokens;
  return l;
}

// Tokens [first, first + n) of one span, at one head.
struct ExactPiece {
  Span span;
  int head, head_slot;  // of the model, of the decoded weights
  int first_of_span, n_tokens;

  __device__ int token(int i) const { return span.first_token + first_of_span + i; }
  __device__ int visible(int i) const { return visible_cells(span, first_of_span + i); }
};

__device__ inline float k_b_at(const AttentionArgs& a, const float* k_b, int c, int n) {
  return a.k_b_transposed ? k_b[int64_t{n} * a.c + c] : k_b[int64_t{c} * a.n + n];
}

// q of the piece's tokens: [tokens][C or N, then R].
__device__ inline void exact_queries(const AttentionArgs& a, const ExactPiece& p, const float* k_b,
                                     const ExactLayout& l, float* smem) {
  const int width = p.span.expanded != 0 ? a.n : a.c;
  for (int i = 0; i < p.n_tokens; ++i) {
    float* q = smem + l.q + i * l.q_row;
    for (int d = threadIdx.x; d < width; d += kExactThreads) {
      float value = 0.0f;
      if (p.span.expanded != 0) {
        value = query_value(a.q_nope, p.token(i), p.head, d);
      } else {
        for (int n = 0; n < a.n; ++n) {
          value = fmaf(query_value(a.q_nope, p.token(i), p.head, n), k_b_at(a, k_b, d, n), value);
        }
      }
      q[d] = value;
    }
    for (int d = threadIdx.x; d < a.r; d += kExactThreads) {
      q[width + d] = query_value(a.q_rope, p.token(i), p.head, d);
    }
    for (int d = threadIdx.x; d < l.acc_row; d += kExactThreads)
      smem[l.acc + i * l.acc_row + d] = 0;
  }
}

// Cells [begin, begin + n) of the span: latents and rope parts, one after the other.
__device__ inline void exact_cells(const AttentionArgs& a, const ExactPiece& p, int begin, int n,
                                   const ExactLayout& l, float* smem) {
  for (int i = 0; i < n; ++i) {
    const int64_t row = cache_row(a, p.span, begin + i);
    float* cell = smem + l.cells + i * l.cell_row;
    for (int d = threadIdx.x; d < l.cell_row; d += kExactThreads) {
      cell[d] = d < a.c ? cache_value(cell_at(a.latent, row), a.latent.format, d)
                        : cache_value(cell_at(a.rope, row), a.rope.format, d - a.c);
    }
  }
}

// Keys [n][N] and values [n][V] of the head, out of the cells' latents.
__device__ inline void exact_expand(const AttentionArgs& a, const float* k_b, const float* v_b,
                                    int n, const ExactLayout& l, float* smem) {
  for (int d = threadIdx.x; d < a.n + a.v; d += kExactThreads) {
    float sum[kExactCells] = {};
    for (int c = 0; c < a.c; ++c) {
      const float w = d < a.n ? k_b_at(a, k_b, c, d) : v_b[int64_t{d - a.n} * a.c + c];
#pragma unroll
      for (int i = 0; i < kExactCells; ++i) {
        sum[i] = fmaf(w, smem[l.cells + i * l.cell_row + c], sum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kExactCells; ++i) {
      if (i >= n) break;
      if (d < a.n) smem[l.keys + i * a.n + d] = sum[i];
      if (d >= a.n) smem[l.values + i * a.v + d - a.n] = sum[i];
    }
  }
}

// scores[token][cell], one warp per pair.
__device__ inline void exact_scores(const AttentionArgs& a, const ExactPiece& p, int n,
                                    const ExactLayout& l, float* smem) {
  const int lane = threadIdx.x % 32;
  const bool expanded = p.span.expanded != 0;
  const int width = expanded ? a.n : a.c;
  for (int pair = threadIdx.x / 32; pair < p.n_tokens * n; pair += kExactThreads / 32) {
    const int cell = pair % n;
    const float* q = smem + l.q + pair / n * l.q_row;
    const float* latent = smem + l.cells + cell * l.cell_row;
    const float* key = expanded ? smem + l.keys + cell * a.n : latent;
    float sum = 0.0f;
    for (int d = lane; d < width; d += 32) sum = fmaf(q[d], key[d], sum);
    for (int d = lane; d < a.r; d += 32) sum = fmaf(q[width + d], latent[a.c + d], sum);
    sum = warp_sum(sum);
    if (lane == 0) smem[l.scores + pair / n * kExactCells + cell] = a.scale * sum;
  }
}

// Scores become weights exp(s - max); stats of a token: max, sum, factor for what was summed so
// far.
__device__ inline void exact_softmax(const ExactPiece& p, int begin, int n, const ExactLayout& l,
                                     float* smem) {
  const int i = threadIdx.x;
  if (i >= p.n_tokens) return;
  float* stats = smem + l.stats + 3 * i;
  float* scores = smem + l.scores + i * kExactCells;
  const int seen = min(n, p.visible(i) - begin);
  const float before = begin == 0 ? kMinusInf : stats[0];
  float max = before;
  for (int cell = 0; cell < seen; ++cell) max = fmaxf(max, scores[cell]);
  const float factor = begin == 0 ? 0.0f : exp_exact(before - max);
  float sum = begin == 0 ? 0.0f : stats[1] * factor;
  for (int cell = 0; cell < seen; ++cell) {
    scores[cell] = exp_exact(scores[cell] - max);
    sum += scores[cell];
  }
  stats[0] = max;
  stats[1] = sum;
  stats[2] = factor;
}

__device__ inline void exact_accumulate(const AttentionArgs& a, const ExactPiece& p, int begin,
                                        int n, const ExactLayout& l, float* smem) {
  const bool expanded = p.span.expanded != 0;
  const int width = expanded ? a.v : a.c;
  const float* values = smem + (expanded ? l.values : l.cells);
  const int row = expanded ? a.v : l.cell_row;
  for (int at = threadIdx.x; at < p.n_tokens * width; at += kExactThreads) {
    const int i = at / width, d = at % width;
    const int seen = min(n, p.visible(i) - begin);
    float* acc = smem + l.acc + i * l.acc_row + d;
    float sum = *acc * smem[l.stats + 3 * i + 2];
    for (int cell = 0; cell < seen; ++cell) {
      sum = fmaf(smem[l.scores + i * kExactCells + cell], values[cell * row + d], sum);
    }
    *acc = sum;
  }
}

__device__ inline void exact_outputs(const AttentionArgs& a, const ExactPiece& p, const float* v_b,
                                     const ExactLayout& l, const float* smem) {
  for (int at = threadIdx.x; at < p.n_tokens * a.v; at += kExactThreads) {
    const int i = at / a.v, d = at % a.v;
    const float* acc = smem + l.acc + i * l.acc_row;
    float value = acc[d < l.acc_row ? d : 0];
    if (p.span.expanded == 0) {
      value = 0.0f;
      for (int c = 0; c < a.c; ++c) value = fmaf(acc[c], v_b[int64_t{d} * a.c + c], value);
    }
    a.out[(int64_t{p.token(i)} * a.h + p.head) * a.v + d] = value / smem[l.stats + 3 * i + 1];
  }
}

__device__ inline void exact_piece(const AttentionArgs& a, const ExactHeads& heads,
                                   const ExactPiece& p, float* smem) {
  const ExactLayout l = exact_layout(a);
  const float* k_b = heads.k_b + int64_t{p.head_slot} * a.c * a.n;
  const float* v_b = heads.v_b + int64_t{p.head_slot} * a.c * a.v;
  exact_queries(a, p, k_b, l, smem);
  const int n_cells = p.visible(p.n_tokens - 1);
  for (int begin = 0; begin < n_cells; begin += kExactCells) {
    const int n = min(kExactCells, n_cells - begin);
    __syncthreads();
    exact_cells(a, p, begin, n, l, smem);
    __syncthreads();
    if (p.span.expanded != 0) {
      exact_expand(a, k_b, v_b, n, l, smem);
      __syncthreads();
    }
    exact_scores(a, p, n, l, smem);
    __syncthreads();
    exact_softmax(p, begin, n, l, smem);
    __syncthreads();
    exact_accumulate(a, p, begin, n, l, smem);
  }
  __syncthreads();
  exact_outputs(a, p, v_b, l, smem);
  __syncthreads();
}

__device__ inline bool wants_span(Contraction spans, bool expanded) {
  return spans == Contraction::any || (spans == Contraction::expanded) == expanded;
}

// Grid [heads of the group, tokens / kExactTokens].
__global__ void __launch_bounds__(kExactThreads)
    exact_kernel(AttentionArgs a, ExactHeads heads, Contraction spans) {
  pdl_wait();
  float* smem = dynamic_smem<float>();
  const int head = heads.first_head + static_cast<int>(blockIdx.x);
  int token = static_cast<int>(blockIdx.y) * kExactTokens;
  const int end = min(token + kExactTokens, a.t);
  while (token < end) {
    const int index = find_span(a, token);
    if (index < 0) {
      float* out = a.out + (int64_t{token} * a.h + head) * a.v;
      const int n = wants_span(spans, false) ? a.v : 0;
      for (int d = threadIdx.x; d < n; d += kExactThreads) out[d] = 0.0f;
      ++token;
      continue;
    }
    const Span span = load_span(a, index).span;
    const int n = min(end, span.first_token + span.n_tokens) - token;
    if (wants_span(spans, span.expanded != 0)) {
      const int slot = static_cast<int>(blockIdx.x);
      exact_piece(a, heads, {span, head, slot, token - span.first_token, n}, smem);
    }
    token += n;
  }
}

}  // namespace mla::cuda
