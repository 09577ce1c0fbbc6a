// Cells of the cache as panels of bf16 pairs: see attention_bf16.inc.h, for attention.inc.cpp
// alone.
#pragma once

#include "backends/cpu/kernels/attention_bf16_rows.inc.h"

namespace mla::cpu::MLA_ISA {
namespace {

// ---- cells --------------------------------------------------------------------------------------
constexpr int64_t chunk_bytes(Format format) {
  return format == Format::Q8_0 ? int64_t{sizeof(uint16_t)} + kChunk
                                : kChunk * (format == Format::F32 ? 4 : 2);
}
// One chunk of a cell's row, rounded to bf16.
template <Format format>
inline I32 load_chunk(const std::byte* row, int64_t chunk) {
  if constexpr (format == Format::Q8_0) {
    const std::byte* block = row + chunk * chunk_bytes(format);
    const float scale = f16_to_f32(load_as<uint16_t>(block));
    const F32x16 low = scale * widen_s8(load_as<U8x16>(block + sizeof(uint16_t)));
    const F32x16 high = scale * widen_s8(load_as<U8x16>(block + sizeof(uint16_t) + kLanes));
    return join_pairs(low.v[0], high.v[0]);
  } else if constexpr (format == Format::F32) {
    const float* x = reinterpret_cast<const float*>(row) + chunk * kChunk;
    return join_pairs(load(x), load(x + kLanes));
  } else {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(row) + chunk * kChunk;
    if constexpr (format == Format::BF16) return load_as<I32>(x);
    return join_pairs(load_f16(x), load_f16(x + kLanes));
  }
}

// Where the rows of a panel's cells come from and go. values may be null.
struct PanelPlane {
  const std::byte* const* rows;  // [n_cells], rounded up to an even number
  int64_t n_cells, n;
  Pair* keys;
  Pair* values;
};

// The chunk of a row that ends within it: the rest is zeros.
template <Format format>
inline I32 load_last_chunk(const std::byte* row, int64_t chunk, int64_t n) {
  std::byte whole[chunk_bytes(format)] = {};  // Q8_0 has whole chunks only
  const auto n_bytes = static_cast<size_t>((n % kChunk) * chunk_bytes(format) / kChunk);
  std::memcpy(whole, row + chunk * chunk_bytes(format), n_bytes);
  return load_chunk<format>(whole, 0);
}

// Chunk by chunk, so that what is stored lies side by side: rows of keys are 4 KiB apart.
template <Format format>
void fill_panel(const PanelPlane& p) {
  for (int64_t chunk = 0; chunk < n_chunks(p.n); ++chunk) {
    const bool whole = (chunk + 1) * kChunk <= p.n;
    Pair* keys = p.keys + chunk * kPanelCells * kLanes;
    const int64_t column = chunk * kChunk;
    Pair* values =
        p.values + column / kOutColumns * kPanelPairs * kOutColumns + column % kOutColumns;
    for (int64_t cell = 0; cell < p.n_cells; cell += 2, keys += kChunk, values += kOutColumns) {
      const std::byte* a = p.rows[cell];
      const std::byte* b = p.rows[cell + 1];
      const I32 even =
          whole ? load_chunk<format>(a, chunk) : load_last_chunk<format>(a, chunk, p.n);
      const I32 odd = whole ? load_chunk<format>(b, chunk) : load_last_chunk<format>(b, chunk, p.n);
      store_pairs(keys, even);
      store_pairs(keys + kLanes, odd);
      if (p.values == nullptr) continue;
      I32 low, high;
      zip_words(even, odd, &low, &high);
      store_pairs(values, low);
      store_pairs(values + kLanes, high);
    }
  }
}

void fill_panel(Format format, const PanelPlane& p) {
  if (format == Format::F16) return fill_panel<Format::F16>(p);
  if (format == Format::BF16) return fill_panel<Format::BF16>(p);
  if (format == Format::Q8_0) return fill_panel<Format::Q8_0>(p);
  fill_panel<Format::F32>(p);
}

// Where the rows of a panel's cells lie, in both planes.
struct PanelRows {
  const std::byte* latent[kPanelCells];
  const std::byte* rope[kPanelCells];
  int64_t n_cells;
};
// Logical cells [begin, end), at most kPanelCells. Up to the next multiple of kSums, which scores
// are computed for, cells are `zeros`: zero bytes are zeros in every format.
void locate(const CacheCells& cells, int64_t begin, int64_t end, const std::byte* zeros,
            PanelRows* rows) {
  rows->n_cells = end - begin < kPanelCells ? end - begin : kPanelCells;
  const int64_t first = cells.first_cell + begin;
  int64_t block = first / cells.block_cells;
  int64_t within = first % cells.block_cells;
  for (int64_t i = 0; i < rows->n_cells; ++i) {
    const int64_t cell = cells.blocks[block] * cells.block_cells + within;
    rows->latent[i] = cells.latent.data + cell * cells.latent.row_bytes;
    rows->rope[i] = cells.rope.data + cell * cells.rope.row_bytes;
    if (++within == cells.block_cells) {
      within = 0;
      ++block;
    }
  }
  for (int64_t i = rows->n_cells; i < kPanelCells; ++i) rows->latent[i] = rows->rope[i] = zeros;
}

// Towards the second-level cache: rows lie apart in the cache, where no prefetcher foresees them.
inline void fetch_rows(const std::byte* const* rows, int64_t n_rows, int64_t n_bytes) {
  for (int64_t i = 0; i < n_rows; ++i) {
    for (int64_t j = 0; j < n_bytes; j += 64) __builtin_prefetch(rows[i] + j, 0, 2);
  }
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
