// Attention with expanded keys and values: each latent becomes keys and values of all heads once,
// then every query meets N + R + V numbers per cell instead of 2 C + R.
//
// The context goes through in blocks of kBlockCells cells, a block's heads in groups:
//   1. cells   the block's latents and rope rows as float32, in panels [dim][kPanelCells]
//   2. expand  keys (panels) and values of a group of heads; k_b and v_b are decoded to float32 for
//              kTaskCells cells at a time, both precisions alike
//   3. attend  every tile of queries of every head of the group, running softmax kept in `max`,
//              `sum` and the output itself between blocks
// Scratch, in floats: kBlockCells * (C + R) of a block, kExpandedCells * (N + V) of a group,
// 2 * T * H for the running softmax, 2 * max(N, V) * C for each thread: 10 MB and 0.5 MB a thread
// for N = V = 128, C = 512 and 512 tokens of 16 heads, at any context length.
#include <algorithm>
#include <limits>

#include "backends/cpu/ops/attention_common.h"

namespace mla::cpu {
namespace {

constexpr int64_t kBlockCells = 512;
constexpr int64_t kExpandedCells = 8192;  // cells * heads whose keys and values exist at a time
// Decoding a weight costs a cycle or less and is then used 128 times, at some 16 products a cycle.
constexpr int64_t kTaskCells = 128;
static_assert(kBlockCells % kTaskCells == 0 && kTaskCells % kPanelCells == 0);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Block {
  float* latent;       // [panels][pad(C)][kPanelCells]
  float* rope;         // [panels][pad(R)][kPanelCells]
  float* keys;         // [group heads][panels][pad(N)][kPanelCells]
  float* values;       // [group heads][kBlockCells][pad(V)]
  float* max;          // [H, T]
  float* sum;          // [H, T]
  std::byte* threads;  // [n_threads, thread_bytes]
  int64_t thread_bytes, group_heads;
  int64_t begin = 0, n_cells = 0;  // the span's logical cells of the block
  int64_t first_head = 0;          // of the group

  float* head_keys(const AttentionShape& s, int64_t slot) const {
    return keys + slot * kBlockCells * s.np;
  }
  float* head_values(const AttentionShape& s, int64_t slot) const {
    return values + slot * kBlockCells * s.vp;
  }
  float* scratch(int thread) const {
    return reinterpret_cast<float*>(threads + thread * thread_bytes);
  }
};

// Whichever of the three passes needs most.
int64_t thread_floats(const AttentionShape& s) {
  const int64_t cells = kPanelCells * (s.cp + s.rp);
  const int64_t weights = std::max(s.np, s.vp) * s.cp;
  const int64_t expand = weights + std::max(s.np * s.cp, s.vp * kPanelCells);
  const int64_t queries = kTileRows * (s.n + s.r) + kTileRows * kPanelCells;
  return std::max({cells, expand, queries});
}

Block carve(const AttentionShape& s, Carver& carver) {
  Block b;
  b.group_heads = std::min(s.h, kExpandedCells / kBlockCells);
  b.thread_bytes = ceil_div(thread_floats(s) * int64_t{sizeof(float)}, 64) * 64;
  b.latent = carver.take<float>(kBlockCells * s.cp);
  b.rope = carver.take<float>(kBlockCells * s.rp);
  b.keys = carver.take<float>(b.group_heads * kBlockCells * s.np);
  b.values = carver.take<float>(b.group_heads * kBlockCells * s.vp);
  b.max = carver.take<float>(s.h * s.t);
  b.sum = carver.take<float>(s.h * s.t);
  b.threads = carver.take<std::byte>(b.thread_bytes * s.n_threads);
  return b;
}

// ---- 1: cells -----------------------------------------------------------------------------------
void load_panel(const AttentionCall& call, const CacheCells& cells, const Block& b, int64_t panel,
                int thread) {
  const AttentionShape& s = call.shape;
  const AttentionTable& kernels = *call.run.kernels.attention;
  const int64_t first = panel * kPanelCells;
  const int64_t n = std::min(kPanelCells, b.n_cells - first);
  float* latent = b.scratch(thread);
  float* rope = latent + kPanelCells * s.cp;
  kernels.load_cells(cells, b.begin + first, b.begin + first + n, latent, s.cp, rope, s.rp);
  std::fill(latent + n * s.cp, latent + kPanelCells * s.cp, 0.0f);
  std::fill(rope + n * s.rp, rope + kPanelCells * s.rp, 0.0f);
  kernels.transpose(latent, s.cp, kPanelCells, s.c, b.latent + first * s.cp, kPanelCells);
  kernels.transpose(rope, s.rp, kPanelCells, s.r, b.rope + first * s.rp, kPanelCells);
}

// ---- 2: expand ----------------------------------------------------------------------------------
// One head's weight as float32 [n, pad(C)]; stored either like that or, `across`, as [C, n].
void decode_weight(const AttentionCall& call, const Tensor& weight, int64_t head, bool across,
                   int64_t n, float* out, float* room) {
  const AttentionShape& s = call.shape;
  const auto& decode = call.run.kernels.matmul->decode;
  if (!across) {
    for (int64_t i = 0; i < n; ++i) {
      decode(weight.format, weight.at(0, head, i), s.c, out + i * s.cp);
    }
    return;
  }
  const int64_t row = pad_floats(n);
  for (int64_t i = 0; i < s.c; ++i) {
    decode(weight.format, weight.at(0, head, i), n, room + i * row);
  }
  call.run.kernels.attention->transpose(room, row, s.cp, n, out, s.cp);
}

// Task: cells [first, first + kTaskCells) of one head's keys, or of its values.
void expand(const AttentionCall& call, const Block& b, int64_t slot, bool values, int64_t first,
            int thread) {
  const AttentionShape& s = call.shape;
  const AttentionTable& kernels = *call.run.kernels.attention;
  float* weight = b.scratch(thread);
  float* room = weight + std::max(s.np, s.vp) * s.cp;
  const int64_t n = values ? s.v : s.n;
  decode_weight(call, values ? call.v_b() : call.k_b(), b.first_head + slot,
                !values && !call.attrs.k_b_transposed, n, weight, room);
  const int64_t end = std::min(first + kTaskCells, b.n_cells);
  for (int64_t cell = first; cell < end; cell += kPanelCells) {
    float* panel = values ? room : b.head_keys(s, slot) + cell * s.np;
    kernels.product({weight, s.cp, b.latent + cell * s.cp, kPanelCells, panel, kPanelCells, nullptr,
                     n, kPanelCells, s.c});
    if (!values) continue;
    kernels.transpose(panel, kPanelCells, s.vp, kPanelCells, b.head_values(s, slot) + cell * s.vp,
                      s.vp);
  }
}

// ---- 3: attend ----------------------------------------------------------------------------------
void attend(const AttentionCall& call, const Span& span, const Block& b, int64_t slot,
            int64_t first, int thread) {
  const AttentionShape& s = call.shape;
  const int64_t head = b.first_head + slot;
  ExpandedTile tile;
  tile.n_rows = std::min(kTileRows, span.n_tokens - first);
  int64_t visible[kTileRows];
  for (int64_t i = 0; i < tile.n_rows; ++i) {
    visible[i] = span.n_cells - span.n_tokens + 1 + first + i - b.begin;
  }
  tile.visible = visible;
  tile.n_cells = std::min(b.n_cells, visible[tile.n_rows - 1]);
  if (tile.n_cells <= 0) return;  // the block is later than these tokens
  float* q = b.scratch(thread);
  const RowTable& rows = *call.run.kernels.row;
  for (int64_t i = 0; i < tile.n_rows; ++i) {
    const int64_t token = span.first_token + first + i;
    float* q_row = q + i * (s.n + s.r);
    rows.to_f32(call.q_nope(token, head), Format::F32, call.q_nope().stride[3], s.n, q_row);
    rows.to_f32(call.q_rope(token, head), Format::F32, call.q_rope().stride[3], s.r, q_row + s.n);
  }
  tile.q = q;
  tile.keys = b.head_keys(s, slot);
  tile.rope_keys = b.rope;
  tile.values = b.head_values(s, slot);
  tile.n = s.n;
  tile.r = s.r;
  tile.v = s.v;
  tile.scale = call.attrs.scale;
  tile.rows = {call.out(span.first_token + first, head), s.h * s.v,
               b.max + head * span.n_tokens + first, b.sum + head * span.n_tokens + first};
  tile.scratch = q + kTileRows * (s.n + s.r);
  call.run.kernels.attention->expanded(tile);
}

void run_block(const AttentionCall& call, const Span& span, Block& b) {
  sys::ThreadPool& pool = call.run.pool;
  const CacheCells cells = call.cells(span);
  const int64_t n_panels = ceil_div(b.n_cells, kPanelCells);
  const int64_t n_chunks = ceil_div(b.n_cells, kTaskCells);
  const int64_t n_tiles = ceil_div(span.n_tokens, kTileRows);
  pool.parallel_for(n_panels,
                    [&](int64_t panel, int thread) { load_panel(call, cells, b, panel, thread); });
  for (b.first_head = 0; b.first_head < call.shape.h; b.first_head += b.group_heads) {
    call.run.checkpoint();
    const int64_t n_heads = std::min(b.group_heads, call.shape.h - b.first_head);
    pool.parallel_for(n_heads * 2 * n_chunks, [&](int64_t task, int thread) {
      const int64_t first = task % n_chunks * kTaskCells;
      expand(call, b, task / n_chunks / 2, task / n_chunks % 2 != 0, first, thread);
    });
    pool.parallel_for(n_heads * n_tiles, [&](int64_t task, int thread) {
      attend(call, span, b, task / n_tiles, task % n_tiles * kTileRows, thread);
    });
  }
}

}  // namespace

size_t expanded_scratch_bytes(const AttentionShape& shape) {
  Carver carver(nullptr);
  carve(shape, carver);
  return carver.used_bytes();
}

void run_expanded(const AttentionCall& call, const Span& span, std::byte* scratch) {
  const AttentionShape& s = call.shape;
  Carver carver(scratch);
  Block b = carve(s, carver);
  const int64_t n_tokens = span.n_tokens;
  call.run.pool.parallel_for(n_tokens, [&](int64_t token, int) {
    std::fill_n(call.out(span.first_token + token, 0), s.h * s.v, 0.0f);
    for (int64_t head = 0; head < s.h; ++head) {
      b.max[head * n_tokens + token] = -std::numeric_limits<float>::infinity();
      b.sum[head * n_tokens + token] = 0.0f;
    }
  });
  for (b.begin = 0; b.begin < span.n_cells; b.begin += kBlockCells) {
    b.n_cells = std::min<int64_t>(kBlockCells, span.n_cells - b.begin);
    run_block(call, span, b);
  }
  call.run.pool.parallel_for(n_tokens, [&](int64_t token, int) {
    for (int64_t head = 0; head < s.h; ++head) {
      float* out = call.out(span.first_token + token, head);
      const int64_t i = head * n_tokens + token;
      call.run.kernels.attention->merge({out, 0, b.max + i, b.sum + i, 0, 1, s.v}, out);
    }
  });
}

}  // namespace mla::cpu
