// Attention with expanded keys and values: each latent becomes keys and values of all heads once,
// then every query meets N + R + V numbers per cell instead of 2 C + R.
//
// The context goes through in blocks of kBlockCells cells, a block's heads in groups:
//   1. cells   the block's latents and rope rows, in panels of kPanelCells cells
//   2. expand  keys and values of a group of heads: k_b and v_b are decoded for kTaskCells cells at
//              a time
//   3. attend  every tile of queries of every head of the group, running softmax kept in `max`,
//              `sum` and the output itself between blocks
// Scratch, in numbers (float32 or bf16, as the precision has it): kBlockCells * (C + R) of a block,
// kExpandedCells * (N + V) of a group, max(N, V) * C for each thread; and 2 * T * H floats for the
// running softmax: in float32 10 MB and 0.4 MB a thread for N = V = 128, C = 512 and 512 tokens of
// 16 heads, at any context length.
#include <algorithm>
#include <limits>

#include "backends/cpu/ops/attention_common.h"

namespace mla::cpu {
namespace {

constexpr int64_t kBlockCells = 512;
constexpr int64_t kBlockPanels = kBlockCells / kPanelCells;
constexpr int64_t kExpandedCells = 8192;  // cells * heads whose keys and values exist at a time
// Decoding and packing a weight costs some 8 cycles a vector of 16, which then meets as many
// vectors of sums as there are cells: 3 % of the work.
constexpr int64_t kTaskCells = 256;
constexpr int64_t kWeightRows = kPadFloats;  // decoded at a time
static_assert(kBlockCells % kTaskCells == 0 && kTaskCells % kPanelCells == 0);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t n) { return ceil_div(n, 64) * 64; }

struct Block {
  ExpandedBytes bytes;
  std::byte* latent;   // [panels]
  std::byte* rope;     // [panels]
  std::byte* keys;     // [group heads][panels]
  std::byte* values;   // [group heads][panels]
  float* max;          // [H, T]
  float* sum;          // [H, T]
  std::byte* threads;  // [n_threads, thread_bytes]
  int64_t thread_bytes, group_heads;
  int64_t begin = 0, n_cells = 0;  // the span's logical cells of the block
  int64_t first_head = 0;          // of the group

  std::byte* head_keys(int64_t slot) const { return keys + slot * kBlockPanels * bytes.keys; }
  std::byte* head_values(int64_t slot) const { return values + slot * kBlockPanels * bytes.values; }
  std::byte* scratch(int64_t thread) const { return threads + thread * thread_bytes; }
};

// A thread's scratch: the kernels' room, then a weight with some decoded rows, or queries.
int64_t thread_bytes(const AttentionShape& s, const ExpandedBytes& bytes) {
  const int64_t row = std::max({s.cp, s.np, s.vp});
  const int64_t weight = round_up(bytes.weight) + kWeightRows * row * int64_t{sizeof(float)};
  const int64_t queries = s.expanded.tile_rows * (s.np + s.rp) * int64_t{sizeof(float)};
  return round_up(bytes.room) + round_up(std::max(weight, queries));
}

Block carve(const AttentionShape& s, Carver& carver) {
  Block b;
  b.bytes = s.expanded.bytes(s.dims());
  b.group_heads = std::min(s.h, kExpandedCells / kBlockCells);
  b.thread_bytes = thread_bytes(s, b.bytes);
  b.latent = carver.take<std::byte>(kBlockPanels * b.bytes.latent);
  b.rope = carver.take<std::byte>(kBlockPanels * b.bytes.rope);
  b.keys = carver.take<std::byte>(b.group_heads * kBlockPanels * b.bytes.keys);
  b.values = carver.take<std::byte>(b.group_heads * kBlockPanels * b.bytes.values);
  b.max = carver.take<float>(s.h * s.t);
  b.sum = carver.take<float>(s.h * s.t);
  b.threads = carver.take<std::byte>(b.thread_bytes * s.n_threads);
  return b;
}

// ---- 1: cells -----------------------------------------------------------------------------------
void load_panel(const AttentionCall& call, const CacheCells& cells, const Block& b, int64_t panel,
                int thread) {
  const int64_t first = panel * kPanelCells;
  const int64_t end = std::min(first + kPanelCells, b.n_cells);
  call.shape.expanded.cells(cells, b.begin + first, b.begin + end,
                            b.latent + panel * b.bytes.latent, b.rope + panel * b.bytes.rope,
                            b.scratch(thread));
}

// ---- 2: expand ----------------------------------------------------------------------------------
// One head's weight, decoded kWeightRows rows at a time and packed as the kernels want it.
void pack_weight(const AttentionCall& call, const Tensor& weight, int64_t head, WeightRows rows,
                 std::byte* out, float* room) {
  const int64_t n_elems = rows.across ? rows.n : rows.c;
  const int64_t n_rows = rows.across ? rows.c : rows.n;
  rows.rows = room;
  rows.row_floats = pad_floats(n_elems);
  std::fill(room, room + kWeightRows * rows.row_floats, 0.0f);
  for (rows.first = 0; rows.first < n_rows; rows.first += kWeightRows) {
    rows.n_rows = std::min(kWeightRows, n_rows - rows.first);
    for (int64_t i = 0; i < rows.n_rows; ++i) {
      call.run.kernels.matmul->decode(weight.format, weight.at(0, head, rows.first + i), n_elems,
                                      room + i * rows.row_floats);
    }
    call.shape.expanded.pack(rows, out);
  }
}

// Task: cells [first, first + kTaskCells) of one head's keys, or of its values.
void expand(const AttentionCall& call, const Block& b, int64_t slot, bool values, int64_t first,
            int thread) {
  const AttentionShape& s = call.shape;
  std::byte* weight = b.scratch(thread) + round_up(b.bytes.room);
  WeightRows rows = {};
  rows.n = values ? s.v : s.n;
  rows.c = s.c;
  rows.across = !values && !call.attrs.k_b_transposed;
  call.note_read(values ? call.v_b() : call.k_b(), b.first_head + slot, thread);
  pack_weight(call, values ? call.v_b() : call.k_b(), b.first_head + slot, rows, weight,
              reinterpret_cast<float*>(weight + round_up(b.bytes.weight)));
  const int64_t end = std::min(first + kTaskCells, b.n_cells);
  for (int64_t cell = first; cell < end; cell += kPanelCells) {
    const int64_t panel = cell / kPanelCells;
    s.expanded.expand({weight, b.latent + panel * b.bytes.latent, std::min(kPanelCells, end - cell),
                       rows.n, s.c, values,
                       values ? b.head_values(slot) + panel * b.bytes.values
                              : b.head_keys(slot) + panel * b.bytes.keys,
                       b.scratch(thread)});
  }
}

// ---- 3: attend ----------------------------------------------------------------------------------
void load_queries(const AttentionCall& call, int64_t token, int64_t n_rows, int64_t head,
                  float* q) {
  const AttentionShape& s = call.shape;
  const RowTable& rows = *call.run.kernels.row;
  std::fill(q, q + n_rows * (s.np + s.rp), 0.0f);
  for (int64_t i = 0; i < n_rows; ++i, ++token, q += s.np + s.rp) {
    rows.to_f32(call.q_nope(token, head), Format::F32, call.q_nope().stride[3], s.n, q);
    rows.to_f32(call.q_rope(token, head), Format::F32, call.q_rope().stride[3], s.r, q + s.np);
  }
}

void attend(const AttentionCall& call, const Span& span, const Block& b, int64_t slot,
            int64_t first, int thread) {
  const AttentionShape& s = call.shape;
  const int64_t head = b.first_head + slot;
  ExpandedTile tile;
  tile.dims = s.dims();
  tile.n_rows = std::min(s.expanded.tile_rows, span.n_tokens - first);
  int64_t visible[kMaxQueryRows];
  for (int64_t i = 0; i < tile.n_rows; ++i) {
    visible[i] = span.n_cells - span.n_tokens + 1 + first + i - b.begin;
  }
  tile.visible = visible;
  tile.n_cells = std::min(b.n_cells, visible[tile.n_rows - 1]);
  if (tile.n_cells <= 0) return;  // the block is later than these tokens
  auto* q = reinterpret_cast<float*>(b.scratch(thread) + round_up(b.bytes.room));
  load_queries(call, span.first_token + first, tile.n_rows, head, q);
  tile.q = q;
  tile.keys = b.head_keys(slot);
  tile.rope_keys = b.rope;
  tile.values = b.head_values(slot);
  tile.scale = call.attrs.scale;
  tile.rows = {call.out(span.first_token + first, head), s.h * s.v,
               b.max + head * span.n_tokens + first, b.sum + head * span.n_tokens + first};
  tile.scratch = b.scratch(thread);
  s.expanded.attend(tile);
}

void run_block(const AttentionCall& call, const Span& span, Block& b) {
  sys::ThreadPool& pool = call.run.pool;
  const CacheCells cells = call.cells(span);
  const int64_t n_panels = ceil_div(b.n_cells, kPanelCells);
  const int64_t n_chunks = ceil_div(b.n_cells, kTaskCells);
  const int64_t tile_rows = call.shape.expanded.tile_rows;
  const int64_t n_tiles = ceil_div(span.n_tokens, tile_rows);
  pool.parallel_for(n_panels,
                    [&](int64_t panel, int thread) { load_panel(call, cells, b, panel, thread); });
  for (b.first_head = 0; b.first_head < call.shape.h; b.first_head += b.group_heads) {
    call.run.checkpoint();
    const int64_t n_heads = std::min(b.group_heads, call.shape.h - b.first_head);
    // Where the head's k_b is; its v_b is there too, because both are split by heads.
    for_heads(call.run, call.k_b(), b.first_head, n_heads, 2 * n_chunks,
              [&](int64_t task, int thread) {
                const int64_t first = task % n_chunks * kTaskCells;
                expand(call, b, task / n_chunks / 2, task / n_chunks % 2 != 0, first, thread);
              });
    pool.parallel_for(n_heads * n_tiles, [&](int64_t task, int thread) {
      attend(call, span, b, task / n_tiles, task % n_tiles * tile_rows, thread);
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
