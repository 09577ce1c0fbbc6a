// The two modes of attention over panels of bf16 pairs: see attention_bf16.inc.h, for
// attention.inc.cpp alone.
#pragma once

#include "backends/cpu/kernels/attention_bf16_cells.inc.h"

namespace mla::cpu::MLA_ISA {
namespace {

constexpr int64_t longer(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t padded_cells(int64_t n) { return (n + kCellBlock - 1) / kCellBlock * kCellBlock; }

// q [n_rows, pad(a) + pad(b)] -> groups of [chunks of a, then of b][kLanes pairs][kLanes rows].
void pack_queries(const PairRows& rows, const float* q, int64_t a, int64_t b, Pair* out) {
  const int64_t row = pad_floats(a) + pad_floats(b);
  for (int64_t g = 0; g < rows.n_groups; ++g, q += kLanes * row, out += rows.q.group_pairs) {
    const int64_t n_rows = rows.n_rows - g * kLanes;
    pack_lanes(q, row, n_rows, pad_floats(a), out);
    pack_lanes(q + pad_floats(a), row, n_rows, pad_floats(b), out + n_chunks(a) * kLanes * kLanes);
  }
}

// ---- in the latent ------------------------------------------------------------------------------
int64_t absorbed_pairs_scratch_bytes(int64_t c, int64_t r) {
  const int64_t pairs = query_pairs(n_chunks(c) + n_chunks(r)) + key_panel_pairs(c) +
                        key_panel_pairs(r) + value_panel_pairs(c) + kPairScratchFloats;
  return (pairs + longer(c, r)) * int64_t{sizeof(Pair)};
}

void absorbed_pairs(const AbsorbedTile& t) noexcept {
  const int64_t c = t.cells.latent.n;
  const int64_t r = t.cells.rope.n;
  const int64_t chunks = n_chunks(c) + n_chunks(r);
  auto* queries = static_cast<Pair*>(t.scratch);
  Pair* latent = queries + query_pairs(chunks);
  Pair* rope = latent + key_panel_pairs(c);
  Pair* values = rope + key_panel_pairs(r);
  Pair* weights = values + value_panel_pairs(c);
  auto* scores = reinterpret_cast<float*>(weights + kPairTileRows * kPanelPairs);
  auto* zeros = reinterpret_cast<std::byte*>(scores + kPairTileRows * kPanelCells);

  std::memset(zeros, 0, static_cast<size_t>(longer(c, r)) * sizeof(float));
  PanelRows now, next;
  locate(t.cells, t.begin, t.end, zeros, &next);
  fetch_rows(next.latent, next.n_cells, t.cells.latent.row_bytes);
  fetch_rows(next.rope, next.n_cells, t.cells.rope.row_bytes);
  PairUnit unit;
  PairRows rows;
  rows.n_rows = t.n_rows;
  rows.n_groups = (t.n_rows + kLanes - 1) / kLanes;
  rows.q = {queries, chunks * kLanes * kLanes};
  rows.scale = t.scale;
  rows.visible = t.visible;
  rows.out_columns = pad_floats(c);
  load_rows(t.rows, &rows);
  pack_queries(rows, t.q, c, r, queries);
  for (int64_t cell = t.begin; cell < t.end; cell += kPanelCells) {
    now = next;
    if (cell + kPanelCells < t.end) locate(t.cells, cell + kPanelCells, t.end, zeros, &next);
    const int64_t padded = padded_cells(now.n_cells);
    fill_panel(t.cells.latent.format, {now.latent, padded, c, latent, values});
    fill_panel(t.cells.rope.format, {now.rope, padded, r, rope, nullptr});
    const bool last = cell + kPanelCells >= t.end;
    const KeyPart parts[] = {
        {latent, n_chunks(c), last ? nullptr : next.latent, chunk_bytes(t.cells.latent.format)},
        {rope, n_chunks(r), last ? nullptr : next.rope, chunk_bytes(t.cells.rope.format)}};
    attend_panel(unit, &rows, parts, 2, values, cell, now.n_cells, {scores, weights});
  }
  store_rows(rows, t.rows);
}

// ---- expanded -----------------------------------------------------------------------------------
// A panel's latents are keys to the weights k_b and v_b, whose rows are the queries: what comes
// out, [cell][row of the weight], is rounded once more and stored as keys or as values.
ExpandedBytes expanded_pairs_bytes(const HeadDims& d) {
  const int64_t c_pairs = n_chunks(d.c) * kLanes;
  const int64_t attend = query_pairs(n_chunks(d.n) + n_chunks(d.r)) + kPairScratchFloats;
  ExpandedBytes bytes;
  bytes.latent = key_panel_pairs(d.c) * int64_t{sizeof(Pair)};
  bytes.rope = key_panel_pairs(d.r) * int64_t{sizeof(Pair)};
  bytes.keys = key_panel_pairs(d.n) * int64_t{sizeof(Pair)};
  bytes.values = value_panel_pairs(d.v) * int64_t{sizeof(Pair)};
  bytes.weight = pad_floats(longer(d.n, d.v)) * c_pairs * int64_t{sizeof(Pair)};
  bytes.room = longer(attend, longer(d.c, d.r)) * int64_t{sizeof(Pair)};
  return bytes;
}

void expanded_pairs_cells(const CacheCells& cells, int64_t begin, int64_t end, std::byte* latent,
                          std::byte* rope, void* room) noexcept {
  auto* zeros = static_cast<std::byte*>(room);
  const int64_t floats = longer(cells.latent.n, cells.rope.n);
  std::memset(zeros, 0, static_cast<size_t>(floats) * sizeof(float));
  PanelRows rows;
  locate(cells, begin, end, zeros, &rows);
  const int64_t padded = padded_cells(end - begin);
  fill_panel(cells.latent.format,
             {rows.latent, padded, cells.latent.n, reinterpret_cast<Pair*>(latent), nullptr});
  fill_panel(cells.rope.format,
             {rows.rope, padded, cells.rope.n, reinterpret_cast<Pair*>(rope), nullptr});
}

// Rows of c numbers are queries as they are; of rows of n numbers, two become a row of pairs.
void expanded_pairs_pack(const WeightRows& w, std::byte* out) noexcept {
  const int64_t group_pairs = n_chunks(w.c) * kLanes * kLanes;
  auto* pairs = reinterpret_cast<Pair*>(out);
  if (!w.across) {
    return pack_lanes(w.rows, w.row_floats, w.n_rows, pad_floats(w.c),
                      pairs + w.first / kLanes * group_pairs);
  }
  for (int64_t i = 0; i < w.n_rows; i += 2) {
    const float* even = w.rows + i * w.row_floats;
    for (int64_t n = 0; n < w.n; n += kLanes) {
      const F32 odd = i + 1 < w.n_rows ? load(even + w.row_floats + n) : zero();
      store_pairs(pairs + n / kLanes * group_pairs + (w.first + i) / 2 * kLanes,
                  zip_pairs(load(even + n), odd));
    }
  }
  // Columns of the last chunk that the weight does not have meet zeros of the cells.
  for (int64_t pair = (w.first + w.n_rows + 1) / 2;
       w.first + w.n_rows == w.c && pair < n_chunks(w.c) * kLanes; ++pair) {
    for (int64_t n = 0; n < w.n; n += kLanes) {
      store_pairs(pairs + n / kLanes * group_pairs + pair * kLanes, I32{});
    }
  }
}

void expanded_pairs_expand(const ExpandTask& t) noexcept {
  PairUnit unit;
  const KeyPart latent = {reinterpret_cast<const Pair*>(t.latent), n_chunks(t.c), nullptr, 0};
  const Queries weight = {reinterpret_cast<const Pair*>(t.weight), n_chunks(t.c) * kLanes * kLanes};
  auto* out = reinterpret_cast<Pair*>(t.out);
  const int64_t n_groups = (t.n + kLanes - 1) / kLanes;
  const int64_t padded = padded_cells(t.n_cells);
  if (t.values) {
    panel_products(
        unit, &latent, 1, weight, padded, n_groups,
        [&]<int kCells, int kGroups>(int64_t cell, int64_t group,
                                     const F32(&sum)[kCells][kGroups]) {
#pragma GCC unroll 16
          for (int i = 0; i < kCells / 2 * kGroups; ++i) {
            const int c = i / kGroups * 2;
            const int64_t column = (group + i % kGroups) * kLanes;
            Pair* to = out + (column / kOutColumns * kPanelPairs + (cell + c) / 2) * kOutColumns +
                       column % kOutColumns;
            store_pairs(to, zip_pairs(sum[c][i % kGroups], sum[c + 1][i % kGroups]));
          }
        });
    return;
  }
  // A chunk of keys is two groups; where the last has one, its columns meet queries that are zero.
  panel_products(
      unit, &latent, 1, weight, padded, n_groups,
      [&]<int kCells, int kGroups>(int64_t cell, int64_t group, const F32(&sum)[kCells][kGroups]) {
#pragma GCC unroll 16
        for (int c = 0; c < kCells; ++c) {
          const F32 odd = kGroups == 2 ? sum[c][kGroups - 1] : zero();
          store_pairs(out + (group / 2 * kPanelCells + cell + c) * kLanes,
                      join_pairs(sum[c][0], odd));
        }
      });
}

void expanded_pairs(const ExpandedTile& t) noexcept {
  const HeadDims& d = t.dims;
  const int64_t chunks = n_chunks(d.n) + n_chunks(d.r);
  auto* queries = static_cast<Pair*>(t.scratch);
  Pair* weights = queries + query_pairs(chunks);
  auto* scores = reinterpret_cast<float*>(weights + kPairTileRows * kPanelPairs);
  PairUnit unit;
  PairRows rows;
  rows.n_rows = t.n_rows;
  rows.n_groups = (t.n_rows + kLanes - 1) / kLanes;
  rows.q = {queries, chunks * kLanes * kLanes};
  rows.scale = t.scale;
  rows.visible = t.visible;
  rows.out_columns = d.v;
  load_rows(t.rows, &rows);
  pack_queries(rows, t.q, d.n, d.r, queries);
  for (int64_t cell = 0; cell < t.n_cells; cell += kPanelCells) {
    const int64_t n = t.n_cells - cell < kPanelCells ? t.n_cells - cell : kPanelCells;
    const int64_t panel = cell / kPanelCells;
    const auto* keys = reinterpret_cast<const Pair*>(t.keys) + panel * key_panel_pairs(d.n);
    const auto* rope = reinterpret_cast<const Pair*>(t.rope_keys) + panel * key_panel_pairs(d.r);
    const auto* values = reinterpret_cast<const Pair*>(t.values) + panel * value_panel_pairs(d.v);
    const KeyPart parts[] = {{keys, n_chunks(d.n), nullptr, 0}, {rope, n_chunks(d.r), nullptr, 0}};
    attend_panel(unit, &rows, parts, 2, values, cell, n, {scores, weights});
  }
  store_rows(rows, t.rows);
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
