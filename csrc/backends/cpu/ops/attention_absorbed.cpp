// Attention in the latent: q_nope meets k_b once per token, then cells are read as they lie.
//
// Tokens go through in rounds of bounded scratch; a round has three parallel passes:
//   1. queries  [tokens, H, pad(C) + pad(R)] = (q_nope k_b, q_rope)
//   2. partial results of every tile of query rows over every run (split) of its cells
//   3. splits merged by log-sum-exp, then multiplied with v_b
// Scratch: kRoundRows query rows and kPartRows partial rows, where a single token's do not exceed
// that, so 9.4 + 16.9 MB for C = 512, R = 64, at any context length.
#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "backends/cpu/ops/attention_common.h"

namespace mla::cpu {
namespace {

constexpr int64_t kRoundRows = 4096;  // query rows (tokens * heads) of a round
constexpr int64_t kPartRows = 8192;   // partial rows (query rows * splits) of a round
// Tasks that one span is cut into where its cells allow it: several for each of the cores that
// share a memory controller. A split costs as much to merge as about two cells to attend, so 128
// cells hide that.
constexpr int64_t kSpanTasks = 64;
constexpr int64_t kMinSplitCells = 128;
// Up to here that would leave most threads idle, and splits are one panel each.
constexpr int64_t kShortSpan = 8 * kMinSplitCells;
// Between two looks at the checkpoint: a few tenths of a second of one core.
constexpr double kSliceFlop = 1e10;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a span's cells are cut. Depends on the span alone: not on threads, nor on its neighbours.
// Splits are powers of two, so that they end where runs of blocks on one node do.
int64_t max_splits(const AttentionShape& s, int64_t n_tokens) {
  return ceil_div(kSpanTasks, std::max<int64_t>(ceil_div(n_tokens * s.h, s.absorbed.tile_rows), 1));
}
int64_t split_cells(const AttentionShape& s, const Span& span) {
  const int64_t cells = ceil_div(span.n_cells, max_splits(s, span.n_tokens));
  const int64_t least = span.n_cells <= kShortSpan ? kPanelCells : kMinSplitCells;
  return std::max(least, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(cells))));
}

// Consecutive tokens of one span that are in the current round.
struct Piece {
  Span span;
  int64_t begin;  // first token, counted in the span
  int64_t n_tokens;
  int64_t q_token;   // first token, counted in the round
  int64_t part_row;  // partial row of split 0; split s follows n_tokens * H rows later
  int64_t split_cells, n_splits;
  int64_t first_task;

  int64_t n_rows(int64_t heads) const { return n_tokens * heads; }
  int64_t n_groups(const AttentionShape& s) const {
    return ceil_div(n_rows(s.h), s.absorbed.tile_rows);
  }
};

struct Round {
  Piece* pieces;       // [max_tokens]
  int64_t* piece_of;   // [max_tokens]: the piece of each token of the round
  float* q;            // [max_tokens * H, pad(C) + pad(R)]
  float* part;         // [max_part_rows, pad(C)]
  float* part_max;     // [max_part_rows]
  float* part_sum;     // [max_part_rows]
  int32_t* order;      // [max_part_rows]: tasks by the node of their cells
  std::byte* threads;  // [n_threads, thread_bytes]
  int64_t max_tokens, max_part_rows, thread_bytes;
  int64_t n_pieces = 0, n_tokens = 0, n_part_rows = 0, n_tasks = 0;
};

int64_t thread_bytes(const AttentionShape& s) {
  const int64_t attend = s.absorbed.scratch_bytes(s.c, s.r);
  const int64_t query = kProductRows * s.q_latent.packed_bytes;
  const int64_t value = kProductRows * s.value.packed_bytes + s.cp * int64_t{sizeof(float)};
  return ceil_div(std::max({attend, query, value}), 64) * 64;
}

Round carve(const AttentionShape& s, Carver& carver) {
  Round round;
  round.max_tokens =
      std::clamp<int64_t>(kRoundRows / std::max<int64_t>(s.h, 1), 1, std::max<int64_t>(s.t, 1));
  const int64_t token_rows = s.h * max_splits(s, 1);  // no span needs more per token
  round.max_part_rows = std::max(token_rows, std::min(s.t * token_rows, kPartRows));
  round.thread_bytes = thread_bytes(s);
  round.pieces = carver.take<Piece>(round.max_tokens);
  round.piece_of = carver.take<int64_t>(round.max_tokens);
  round.q = carver.take<float>(round.max_tokens * s.h * (s.cp + s.rp));
  round.part = carver.take<float>(round.max_part_rows * s.cp);
  round.part_max = carver.take<float>(round.max_part_rows);
  round.part_sum = carver.take<float>(round.max_part_rows);
  round.order = carver.take<int32_t>(round.max_part_rows);  // no task has less than a row
  round.threads = carver.take<std::byte>(round.thread_bytes * s.n_threads);
  return round;
}

// ---- 1: queries ---------------------------------------------------------------------------------
void make_queries(const AttentionCall& call, const Round& round, int64_t head, int64_t first,
                  int thread) {
  const AttentionShape& s = call.shape;
  const int64_t row = s.cp + s.rp;
  const int64_t n = std::min<int64_t>(kProductRows, round.n_tokens - first);
  std::byte* packed = round.threads + thread * round.thread_bytes;
  float* q = round.q + (first * s.h + head) * row;
  for (int64_t i = 0; i < n; ++i) {
    const Piece& piece = round.pieces[round.piece_of[first + i]];
    const int64_t token = piece.span.first_token + piece.begin + (first + i - piece.q_token);
    s.q_latent.pack_row(call.q_nope(token, head), call.q_nope().stride[3], packed, i);
    float* out = q + i * s.h * row;
    std::fill(out + s.c, out + s.cp, 0.0f);
    call.run.kernels.row->to_f32(call.q_rope(token, head), Format::F32, call.q_rope().stride[3],
                                 s.r, out + s.cp);
    std::fill(out + s.cp + s.r, out + row, 0.0f);
  }
  call.note_read(call.k_b(), head, thread);
  s.q_latent.apply(call.k_b(), head, packed, q, s.h * row, n);
}

// ---- 2: partial results -------------------------------------------------------------------------
const Piece* piece_of(const Round& round, int64_t task) {
  return std::upper_bound(round.pieces, round.pieces + round.n_pieces, task,
                          [](int64_t value, const Piece& p) { return value < p.first_task; }) -
         1;
}

void attend(const AttentionCall& call, const Round& round, int64_t task, int thread) {
  const AttentionShape& s = call.shape;
  const Piece* piece = piece_of(round, task);
  // Splits outermost: tasks in flight together read the same cells.
  const int64_t n_rows = piece->n_rows(s.h);
  const int64_t n_groups = piece->n_groups(s);
  const int64_t split = (task - piece->first_task) / n_groups;
  const int64_t first_row = (task - piece->first_task) % n_groups * s.absorbed.tile_rows;

  AbsorbedTile tile;
  tile.cells = call.cells(piece->span);
  tile.n_rows = std::min(s.absorbed.tile_rows, n_rows - first_row);
  int64_t visible[kMaxQueryRows];
  for (int64_t i = 0; i < tile.n_rows; ++i) {
    const int64_t token = piece->begin + (first_row + i) / s.h;
    visible[i] = piece->span.n_cells - piece->span.n_tokens + 1 + token;
  }
  tile.visible = visible;
  tile.begin = split * piece->split_cells;
  tile.end = std::min(tile.begin + piece->split_cells, visible[tile.n_rows - 1]);
  tile.q = round.q + (piece->q_token * s.h + first_row) * (s.cp + s.rp);
  tile.scale = call.attrs.scale;
  const int64_t part_row = piece->part_row + split * n_rows + first_row;
  tile.rows = {round.part + part_row * s.cp, s.cp, round.part_max + part_row,
               round.part_sum + part_row};
  tile.scratch = round.threads + thread * round.thread_bytes;
  std::fill_n(tile.rows.max, tile.n_rows, -std::numeric_limits<float>::infinity());
  std::fill_n(tile.rows.sum, tile.n_rows, 0.0f);
  if (tile.begin >= tile.end) return;  // all of it is later than these tokens
  std::fill_n(tile.rows.out, tile.n_rows * s.cp, 0.0f);
  s.absorbed.run(tile);
}

// Tasks [first, first + n) on the nodes where their cells begin.
void attend_on_nodes(const AttentionCall& call, const Round& round, int64_t first, int64_t n) {
  const auto node_of = [&](int64_t task) {
    const Piece* piece = piece_of(round, task);
    const int64_t split = (task - piece->first_task) / piece->n_groups(call.shape);
    return static_cast<size_t>(call.part_of(piece->span, split * piece->split_cells));
  };
  const size_t n_parts = call.step.in[2].slices->parts.size();
  std::array<int64_t, sys::kMaxNodes + 1> begins = {};
  for (int64_t i = 0; i < n; ++i) ++begins[node_of(first + i) + 1];
  for (size_t i = 0; i < n_parts; ++i) begins[i + 1] += begins[i];
  std::array<int64_t, sys::kMaxNodes + 1> next = begins;
  for (int64_t i = 0; i < n; ++i) {
    round.order[next[node_of(first + i)]++] = static_cast<int32_t>(first + i);
  }
  call.run.pool.parallel_for(
      std::span<const int64_t>(begins.data(), n_parts + 1),
      [&](int64_t i, int thread) { attend(call, round, round.order[i], thread); });
}

// Pass 2, with a look at the checkpoint every now and then.
void attend_all(const AttentionCall& call, const Round& round) {
  const AttentionShape& s = call.shape;
  int64_t longest = 1;
  for (int64_t i = 0; i < round.n_pieces; ++i) {
    longest = std::max(
        longest, std::min<int64_t>(round.pieces[i].split_cells, round.pieces[i].span.n_cells));
  }
  const double task_flop = 2.0 * double(longest * s.absorbed.tile_rows) * double(2 * s.c + s.r + 1);
  const auto per_thread = std::max<int64_t>(int64_t(kSliceFlop / task_flop), 4);
  const int64_t slice = per_thread * call.n_threads();
  for (int64_t first = 0; first < round.n_tasks; first += slice) {
    call.run.checkpoint();
    const int64_t n = std::min(slice, round.n_tasks - first);
    if (call.run.pool.n_nodes() > 1 && call.step.in[2].slices != nullptr) {
      attend_on_nodes(call, round, first, n);
      continue;
    }
    call.run.pool.parallel_for(
        n, [&](int64_t task, int thread) { attend(call, round, first + task, thread); });
  }
}

// ---- 3: values ----------------------------------------------------------------------------------
// Tokens [first, first + kProductRows) of the round, piece by piece: within one, outputs are
// equally far apart.
void make_values(const AttentionCall& call, const Round& round, int64_t head, int64_t first,
                 int thread) {
  const AttentionShape& s = call.shape;
  const int64_t end = std::min(first + kProductRows, round.n_tokens);
  auto* latent = reinterpret_cast<float*>(round.threads + thread * round.thread_bytes);
  auto* packed = reinterpret_cast<std::byte*>(latent + s.cp);
  while (first < end) {
    const Piece& piece = round.pieces[round.piece_of[first]];
    const int64_t n_rows = piece.n_rows(s.h);
    const int64_t in_piece = first - piece.q_token;
    const int64_t n = std::min(end - first, piece.n_tokens - in_piece);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = piece.part_row + (in_piece + i) * s.h + head;
      const MergeRow parts = {round.part + row * s.cp,
                              n_rows * s.cp,
                              round.part_max + row,
                              round.part_sum + row,
                              n_rows,
                              piece.n_splits,
                              s.c};
      call.run.kernels.attention->merge(parts, latent);
      s.value.pack_row(reinterpret_cast<const std::byte*>(latent), sizeof(float), packed, i);
    }
    call.note_read(call.v_b(), head, thread);
    s.value.apply(call.v_b(), head, packed,
                  call.out(piece.span.first_token + piece.begin + in_piece, head), s.h * s.v, n);
    first += n;
  }
}

void run_round(const AttentionCall& call, Round& round) {
  const int64_t heads = call.shape.h;
  const int64_t n_chunks = ceil_div(round.n_tokens, kProductRows);
  call.run.checkpoint();
  for_heads(call.run, call.k_b(), 0, heads, n_chunks, [&](int64_t task, int thread) {
    make_queries(call, round, task / n_chunks, task % n_chunks * kProductRows, thread);
  });
  attend_all(call, round);
  call.run.checkpoint();
  for_heads(call.run, call.v_b(), 0, heads, n_chunks, [&](int64_t task, int thread) {
    make_values(call, round, task / n_chunks, task % n_chunks * kProductRows, thread);
  });
  round.n_pieces = round.n_tokens = round.n_part_rows = round.n_tasks = 0;
}

// Adds as many of the span's tokens from `begin` on as the round has room for.
int64_t add_piece(const AttentionShape& s, Round& round, const Span& span, int64_t begin) {
  Piece piece;
  piece.span = span;
  piece.begin = begin;
  piece.split_cells = split_cells(s, span);
  piece.n_splits = ceil_div(span.n_cells, piece.split_cells);
  piece.n_tokens = std::min({span.n_tokens - begin, round.max_tokens - round.n_tokens,
                             (round.max_part_rows - round.n_part_rows) / (s.h * piece.n_splits)});
  if (piece.n_tokens <= 0) return 0;
  piece.q_token = round.n_tokens;
  piece.part_row = round.n_part_rows;
  piece.first_task = round.n_tasks;
  std::fill_n(round.piece_of + round.n_tokens, piece.n_tokens, round.n_pieces);
  round.pieces[round.n_pieces++] = piece;
  round.n_tokens += piece.n_tokens;
  round.n_part_rows += piece.n_rows(s.h) * piece.n_splits;
  round.n_tasks += piece.n_splits * piece.n_groups(s);
  return piece.n_tokens;
}

}  // namespace

size_t absorbed_scratch_bytes(const AttentionShape& shape) {
  Carver carver(nullptr);
  carve(shape, carver);
  return carver.used_bytes();
}

void run_absorbed(const AttentionCall& call, int64_t n_spans, std::byte* scratch) {
  Carver carver(scratch);
  Round round = carve(call.shape, carver);
  for (int64_t i = 0; i < n_spans; ++i) {
    const Span span = call.span(i);
    if (span.expanded != 0) continue;
    for (int64_t begin = 0; begin < span.n_tokens;) {
      const int64_t added = add_piece(call.shape, round, span, begin);
      if (added == 0) run_round(call, round);
      begin += added;
    }
  }
  if (round.n_tokens > 0) run_round(call, round);
}

}  // namespace mla::cpu
