// Attention of query rows over cells of the latent cache, with running softmax.
//
//   score[i, s] = scale * q[i] . key[s]       -inf where s >= visible[i]
//   max' = max(max, max_s score)              p[i, s] = e^(score - max')
//   sum' = sum * e^(max - max') + sum_s p     out' = out * e^(max - max') + sum_s p value[s]
//
// absorbed: key[s] = latent row and rope row of a cell, value[s] = the latent row. A run of cells
//   is converted to float32 [kTileCells, pad(C) + pad(R)] once for all query rows.
// expanded: keys come in panels, transposed, so that scores need no sum across lanes.
// merge: runs of cells computed apart, weighted by e^(max_part - max).
//
// Here all is float32; the error against float64 is that of float32 sums over N + R (or C + R)
// products and over the cells: about 1e-6 of the largest value. A row's result depends on its own
// cells and on where the runs of cells begin, not on the rows beside it. The cache formats differ
// in decode_row alone. What the table has for `fast` is this again, or attention_bf16.inc.h where
// the ISA multiplies bf16; merge is for both. A score of -inf is a weight of 0; where a row has no
// other, its sum stays 0 and merge makes NaN of it.
#include "backends/cpu/kernels/attention_tiles.inc.h"
#include "backends/cpu/simd/simd.h"
#if defined(MLA_ISA_AVX512BF16)
#include "backends/cpu/kernels/attention_bf16_modes.inc.h"
#endif

namespace mla::cpu::MLA_ISA {
namespace {

// ---- cells --------------------------------------------------------------------------------------
template <F32 (*kLoad)(const uint16_t*), float (*kOne)(uint16_t)>
inline void decode_16(const std::byte* in, int64_t n, float* out) {
  const auto* p = reinterpret_cast<const uint16_t*>(in);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, kLoad(p + i));
  for (; i < n; ++i) out[i] = kOne(p[i]);
}

inline void decode_q8_0(const std::byte* in, int64_t n, float* out) {
  constexpr int kBlock = 32;  // a half scale, then as many signed bytes
  for (int64_t i = 0; i < n; i += kBlock, in += sizeof(uint16_t) + kBlock) {
    const float scale = f16_to_f32(load_as<uint16_t>(in));
    for (int j = 0; j < kBlock; j += 16) {
      const U8x16 codes = load_as<U8x16>(in + sizeof(uint16_t) + j);
      store_f32x16(out + i + j, scale * widen_s8(codes));
    }
  }
}

// One cell's row of a plane as float32, the pad set to zero.
inline void decode_row(const CachePlane& plane, int64_t cell, float* out) {
  const std::byte* in = plane.data + cell * plane.row_bytes;
  const int64_t n = plane.n;
  if (plane.format == Format::F16) {
    decode_16<load_f16, half_to_float>(in, n, out);
  } else if (plane.format == Format::BF16) {
    decode_16<load_bf16, bf16_to_float>(in, n, out);
  } else if (plane.format == Format::Q8_0) {
    decode_q8_0(in, n, out);
  } else {
    std::memcpy(out, in, static_cast<size_t>(n) * sizeof(float));
  }
  for (int64_t i = n; i < pad_floats(n); ++i) out[i] = 0.0f;
}

void load_cells(const CacheCells& cells, int64_t begin, int64_t end, float* latent,
                int64_t latent_row, float* rope, int64_t rope_row) noexcept {
  const int64_t first = cells.first_cell + begin;
  int64_t block = first / cells.block_cells;
  int64_t within = first % cells.block_cells;
  for (int64_t i = 0; i < end - begin; ++i) {
    const int64_t cell = cells.blocks[block] * cells.block_cells + within;
    decode_row(cells.latent, cell, latent + i * latent_row);
    decode_row(cells.rope, cell, rope + i * rope_row);
    if (++within == cells.block_cells) {
      within = 0;
      ++block;
    }
  }
}

void transpose(const float* in, int64_t in_row, int64_t m, int64_t n, float* out,
               int64_t out_row) noexcept {
  for (int64_t j = 0; j < n; j += kLanes) {
    for (int64_t i = 0; i < m; i += kLanes) {
      F32 v[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) v[l] = load(in + (i + l) * in_row + j);
      transpose_square(v);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) store(out + (j + l) * out_row + i, v[l]);
    }
  }
}

// ---- softmax ------------------------------------------------------------------------------------
inline I32 lane_numbers() {
  int32_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  I32 v;
  std::memcpy(&v, lane, sizeof v);
  return v;
}

// Turns one row of `width` scores (a multiple of kLanes), of which the first n_visible count, into
// probabilities against the new maximum; returns the factor of what the row held so far.
inline float softmax_row(float* score, int64_t width, int64_t n_visible, float scale, float* max_io,
                         float* sum_io) {
  if (n_visible == 0) {
    for (int64_t i = 0; i < width; i += kLanes) store(score + i, zero());
    return 1.0f;
  }
  const float lowest = -__builtin_inff();
  const F32 factor = set1(scale);
  F32 best = set1(lowest);
  for (int64_t i = 0; i < width; i += kLanes) {
    const I32 left = static_cast<int32_t>(n_visible - i) - I32{};
    const F32 z = lane_numbers() < left ? load(score + i) * factor : set1(lowest);
    store(score + i, z);
    best = max(z, best);
  }
  const float tile_max = reduce_max(best);
  const float new_max = tile_max > *max_io ? tile_max : *max_io;
  const F32 shift = set1(new_max == lowest ? 0.0f : new_max);
  F32 total = zero();
  for (int64_t i = 0; i < width; i += kLanes) {
    const F32 p = exp(load(score + i) - shift);
    store(score + i, p);
    total = total + p;
  }
  const float kept = exp(set1(*max_io) - shift)[0];
  *max_io = new_max;
  *sum_io = *sum_io * kept + reduce_add(total);
  return kept;
}

// All rows of a tile of `width` scores, whose first cell is `first`; only n_cells of them exist.
inline void softmax_rows(float* scores, int64_t width, int64_t n_rows, int64_t first,
                         int64_t n_cells, const int64_t* visible, float scale,
                         const RunningRows& rows, float* kept) {
  for (int64_t i = 0; i < n_rows; ++i) {
    int64_t n_visible = visible[i] - first;
    n_visible = n_visible < 0 ? 0 : n_visible > n_cells ? n_cells : n_visible;
    kept[i] = softmax_row(scores + i * width, width, n_visible, scale, rows.max + i, rows.sum + i);
  }
}

// ---- the tasks ----------------------------------------------------------------------------------
int64_t absorbed_scratch_bytes(int64_t c, int64_t r) {
  const int64_t cells = kTileCells * (pad_floats(c) + pad_floats(r));
  return (cells + kTileRows * kTileCells) * int64_t{sizeof(float)};
}

void absorbed(const AbsorbedTile& t) noexcept {
  const int64_t latent_row = pad_floats(t.cells.latent.n);
  const int64_t row = latent_row + pad_floats(t.cells.rope.n);
  auto* tile = static_cast<float*>(t.scratch);
  float* scores = tile + kTileCells * row;
  float kept[kTileRows];
  for (int64_t cell = t.begin; cell < t.end; cell += kTileCells) {
    const int64_t n = t.end - cell < kTileCells ? t.end - cell : kTileCells;
    load_cells(t.cells, cell, cell + n, tile, row, tile + latent_row, row);
    dots({t.q, tile, row, t.n_rows, n, scores, kTileCells});
    softmax_rows(scores, kTileCells, t.n_rows, cell, n, t.visible, t.scale, t.rows, kept);
    product(
        {scores, kTileCells, tile, row, t.rows.out, t.rows.out_row, kept, t.n_rows, latent_row, n});
  }
}

// Panels are [dim][kPanelCells], but values [kPanelCells][pad(V)]; a weight is [n, pad(C)].
ExpandedBytes expanded_bytes(const HeadDims& d) {
  const int64_t cells = kPanelCells * (pad_floats(d.c) + pad_floats(d.r));
  const int64_t values = kPanelCells * pad_floats(d.v);
  const int64_t attend = kTileRows * kPanelCells;
  int64_t room = cells > values ? cells : values;
  room = room > attend ? room : attend;
  const int64_t n = d.n > d.v ? d.n : d.v;
  constexpr int64_t kPanelBytes = kPanelCells * int64_t{sizeof(float)};
  return {pad_floats(d.c) * kPanelBytes,
          pad_floats(d.r) * kPanelBytes,
          pad_floats(d.n) * kPanelBytes,
          pad_floats(d.v) * kPanelBytes,
          pad_floats(n) * pad_floats(d.c) * int64_t{sizeof(float)},
          room * int64_t{sizeof(float)}};
}

void expanded_cells(const CacheCells& cells, int64_t begin, int64_t end, std::byte* latent_out,
                    std::byte* rope_out, void* room) noexcept {
  const int64_t c = cells.latent.n;
  const int64_t r = cells.rope.n;
  auto* latent = static_cast<float*>(room);
  float* rope = latent + kPanelCells * pad_floats(c);
  load_cells(cells, begin, end, latent, pad_floats(c), rope, pad_floats(r));
  const auto missing = static_cast<size_t>(kPanelCells - (end - begin)) * sizeof(float);
  std::memset(latent + (end - begin) * pad_floats(c), 0,
              missing * static_cast<size_t>(pad_floats(c)));
  std::memset(rope + (end - begin) * pad_floats(r), 0,
              missing * static_cast<size_t>(pad_floats(r)));
  transpose(latent, pad_floats(c), kPanelCells, c, reinterpret_cast<float*>(latent_out),
            kPanelCells);
  transpose(rope, pad_floats(r), kPanelCells, r, reinterpret_cast<float*>(rope_out), kPanelCells);
}

void expanded_pack(const WeightRows& w, std::byte* weight) noexcept {
  auto* out = reinterpret_cast<float*>(weight);
  const int64_t row = pad_floats(w.c);
  if (w.across) {
    return transpose(w.rows, w.row_floats, kPadFloats, w.n, out + w.first, row);
  }
  for (int64_t i = 0; i < w.n_rows; ++i) {
    std::memcpy(out + (w.first + i) * row, w.rows + i * w.row_floats,
                static_cast<size_t>(row) * sizeof(float));
  }
}

void expand(const ExpandTask& t) noexcept {
  const auto* weight = reinterpret_cast<const float*>(t.weight);
  const auto* latent = reinterpret_cast<const float*>(t.latent);
  auto* out = reinterpret_cast<float*>(t.out);
  auto* panel = t.values ? static_cast<float*>(t.room) : out;
  product({weight, pad_floats(t.c), latent, kPanelCells, panel, kPanelCells, nullptr, t.n,
           kPanelCells, t.c});
  if (!t.values) return;
  const int64_t row = pad_floats(t.n);
  transpose(panel, kPanelCells, row, kPanelCells, out, row);
}

void expanded(const ExpandedTile& t) noexcept {
  static constexpr float kOnes[kTileRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                             1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const auto [dim_n, dim_r, dim_c, dim_v] = t.dims;
  const int64_t q_row = pad_floats(dim_n) + pad_floats(dim_r);
  const int64_t value_row = pad_floats(dim_v);
  auto* scores = static_cast<float*>(t.scratch);
  float kept[kTileRows];
  for (int64_t cell = 0; cell < t.n_cells; cell += kPanelCells) {
    const int64_t n = t.n_cells - cell < kPanelCells ? t.n_cells - cell : kPanelCells;
    const auto* keys = reinterpret_cast<const float*>(t.keys) + cell * pad_floats(dim_n);
    const auto* rope_keys = reinterpret_cast<const float*>(t.rope_keys) + cell * pad_floats(dim_r);
    const auto* values = reinterpret_cast<const float*>(t.values) + cell * value_row;
    product({t.q, q_row, keys, kPanelCells, scores, kPanelCells, nullptr, t.n_rows, kPanelCells,
             dim_n});
    product({t.q + pad_floats(dim_n), q_row, rope_keys, kPanelCells, scores, kPanelCells, kOnes,
             t.n_rows, kPanelCells, dim_r});
    softmax_rows(scores, kPanelCells, t.n_rows, cell, n, t.visible, t.scale, t.rows, kept);
    product({scores, kPanelCells, values, value_row, t.rows.out, t.rows.out_row, kept, t.n_rows,
             dim_v, n});
  }
}

void merge(const MergeRow& row, float* out) noexcept {
  float best = row.max[0];
  for (int64_t part = 1; part < row.n_parts; ++part) {
    const float m = row.max[part * row.stat_stride];
    best = m > best ? m : best;
  }
  float total = 0.0f;
  for (int64_t part = 0; part < row.n_parts; ++part) {
    const float sum = row.sum[part * row.stat_stride];
    if (sum == 0.0f) continue;
    total += exp(set1(row.max[part * row.stat_stride] - best))[0] * sum;
  }
  if (total == 0.0f) {
    for (int64_t i = 0; i < row.n; ++i) out[i] = __builtin_nanf("");
    return;
  }
  bool first = true;
  for (int64_t part = 0; part < row.n_parts; ++part) {
    if (row.sum[part * row.stat_stride] == 0.0f) continue;  // no weight: out may be unwritten
    const F32 difference = set1(row.max[part * row.stat_stride] - best);
    const F32 weight = set1(exp(difference)[0] / total);
    const float* in = row.out + part * row.out_stride;
    for (int64_t i = 0; i < row.n; i += kLanes) {
      const int64_t count = row.n - i;
      F32 v = load_count(in + i, count) * weight;
      if (!first) v = v + load_count(out + i, count);
      store_count(out + i, count, v);
    }
    first = false;
  }
}

constexpr AbsorbedKernel kAbsorbed = {absorbed, absorbed_scratch_bytes, kTileRows};
constexpr ExpandedKernels kExpanded = {expanded_bytes, expanded_cells, expanded_pack,
                                       expand,         expanded,       kTileRows};
#if defined(MLA_ISA_AVX512BF16)
constexpr AbsorbedKernel kAbsorbedFast = {absorbed_pairs, absorbed_pairs_scratch_bytes,
                                          kPairTileRows};
constexpr ExpandedKernels kExpandedFast = {expanded_pairs_bytes, expanded_pairs_cells,
                                           expanded_pairs_pack,  expanded_pairs_expand,
                                           expanded_pairs,       kPairTileRows};
#else
constexpr AbsorbedKernel kAbsorbedFast = kAbsorbed;
constexpr ExpandedKernels kExpandedFast = kExpanded;
#endif

}  // namespace

extern const AttentionTable attention_table;
const AttentionTable attention_table = {
    {kAbsorbedFast, kAbsorbed}, {kExpandedFast, kExpanded}, merge};

}  // namespace mla::cpu::MLA_ISA
