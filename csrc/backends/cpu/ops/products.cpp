#include "backends/cpu/ops/products.h"

#include <algorithm>

#include "backends/cpu/ops/rows.h"
#include "base/error.h"

namespace mla::cpu {
namespace {

// Less than this many products stays one chunk: some 5 us, what a hand-over to a worker costs.
constexpr int64_t kMinChunkProducts = 128 * 1024;
constexpr int64_t kTileCacheBytes = 512 * 1024;
constexpr int64_t kMaxRowsReadAgain = 64;  // of a tile whose rows of w are unpacked over and over
// Unpacking a slab takes as long as multiplying it with some 6 rows of x: a tenth of this.
constexpr int64_t kLeastSlabRows = 64;
constexpr int64_t kChunksPerThread = 4;
// Rows of bf16 need no unpacking, only turning round: kernels that read them as they are keep up
// with slabs for longer.
constexpr int64_t kSlabMinRowsBf16 = 12;
constexpr int64_t kGatherRows = 8;  // rows of w that share a pass over x

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

WeightReader WeightReader::plan(const Layout& w, const MatmulAttrs& attrs,
                                const KernelTable& kernels, int64_t n_rows) {
  const int n_dim = attrs.transpose_w ? 3 : 2;
  const int k_dim = 5 - n_dim;
  WeightReader r{attrs.transpose_w ? Reading::across : Reading::rows,
                 w.format,
                 w.shape.extent[n_dim],
                 w.shape.extent[k_dim],
                 w.stride[n_dim],
                 w.stride[k_dim]};
  if (!traits(w.format).quantized) {  // the strides say which way floats lie, not the flag
    const int64_t unit = traits(w.format).block_bytes;
    r.reading = r.k_stride == unit || r.k <= 1   ? Reading::rows
                : r.n_stride == unit || r.n <= 1 ? Reading::across
                                                 : Reading::gathered;
  }
  const MatmulTable& table = *kernels.matmul;
  const bool exact = attrs.precision == Precision::exact;
  const Format format = r.reading == Reading::gathered ? Format::F32 : w.format;
  const SlabEntry& slab = kernels.slab->rows[static_cast<size_t>(format)];
  const int64_t least = format == Format::BF16 ? kSlabMinRowsBf16 : kSlabMinRows;
  if (r.reading == Reading::rows && !exact && n_rows >= least && r.k > 0 &&
      slab.kernel != nullptr) {
    r.kernel = slab.kernel;
    r.pack = slab.pack;
    r.packed_row_bytes = static_cast<int64_t>(slab.packed_bytes(r.k));
    r.many_rows = true;
    r.granule = kSlabGranule;
    r.room_bytes = static_cast<int64_t>(kernels.slab->room_bytes);
    return r;
  }
  MatmulEntry entry = table.rows[static_cast<size_t>(format)][exact ? 1 : 0];
  if (r.reading == Reading::across) {
    entry = {Packing::f32, table.across[static_cast<size_t>(w.format)]};
    r.granule = kAcrossColumns;
  }
  const auto float_bytes = static_cast<int64_t>(table.packed_bytes(Packing::f32, r.k));
  if (r.reading == Reading::gathered) r.room_bytes = kGatherRows * float_bytes;
  r.kernel = entry.kernel;
  r.pack = table.pack[static_cast<size_t>(entry.packing)];
  r.packed_row_bytes = static_cast<int64_t>(table.packed_bytes(entry.packing, r.k));
  r.takes_floats = entry.packing == Packing::f32;
  return r;
}

namespace {

// y[i][n] (+)= x[i] . w[n] for n in [begin, end), w in one piece.
void multiply_piece(const WeightReader& reader, const std::byte* w, int64_t begin, int64_t end,
                    const RowTile& tile, bool accumulate, std::byte* room) {
  MatmulTile t{w,          reader.n_stride,
               begin,      end,
               reader.k,   tile.x,
               tile.y,     static_cast<int>(tile.n_rows),
               accumulate, room};
  if (reader.reading == Reading::across) t.w_row_bytes = reader.k_stride;
  if (reader.reading != Reading::gathered) return reader.kernel(t);

  float* y[kMaxTileRows];
  t.w = room;
  t.w_row_bytes = reader.room_bytes / kGatherRows;
  t.y = y;
  for (int64_t n = begin; n < end; n += kGatherRows) {
    const int64_t n_rows = std::min(kGatherRows, end - n);
    for (int64_t r = 0; r < n_rows; ++r) {
      reader.pack(w + (n + r) * reader.n_stride, reader.format, reader.k_stride, reader.k,
                  room + r * t.w_row_bytes);
    }
    for (int64_t i = 0; i < tile.n_rows; ++i) y[i] = tile.y[i] + n;
    t.n_begin = 0;
    t.n_end = n_rows;
    reader.kernel(t);
  }
}

}  // namespace

void multiply(const CpuRun& run, int thread, const WeightReader& reader, const Tensor& w,
              const WeightRange& range, const RowTile& tile, int64_t y_begin, bool accumulate,
              std::byte* room) {
  const auto piece = [&](const std::byte* base, int64_t begin, int64_t end) {
    if (run.reads != nullptr && reader.reading == Reading::rows) {
      run.reads->add(thread, base + begin * reader.n_stride, (end - begin) * reader.n_stride);
    }
    multiply_piece(reader, reader.skip(base, y_begin), begin - y_begin, end - y_begin, tile,
                   accumulate, room);
  };
  // Read across, what is cut is K: only slices in place come here, and they lie as a whole.
  if (w.slices == nullptr || reader.reading != Reading::rows)
    return piece(w.at(range.i0, range.i1, 0), range.begin, range.end);
  for (int64_t begin = range.begin; begin < range.end;) {
    const Tensor::Rows rows = w.rows_at(range.i0, range.i1, begin);
    const int64_t end = std::min(begin + rows.n, range.end);
    piece(rows.data - begin * w.stride[2], begin, end);
    begin = end;
  }
}

sys::NodeSplit columns_on_nodes(const WeightReader& reader, const Tensor& w,
                                const sys::RowSplit& columns) {
  const PartBegins rows(w, 2);
  if (!rows.empty() && reader.reading == Reading::rows) {
    return sys::split_on_nodes(rows.span(), columns.rows_per_chunk);
  }
  const int64_t whole[] = {0, columns.n_rows};
  return sys::split_on_nodes(whole, columns.rows_per_chunk);
}

PackedRows::PackedRows(const Layout& x, const WeightReader& reader, Carver& carver)
    : pack_row_(reader.pack), row_bytes_(reader.packed_row_bytes), base_(nullptr) {
  const int64_t k = x.shape.extent[3];
  const bool needs_padding = k % kPackedFloats != 0 && reader.reading != Reading::across;
  in_place_ = reader.takes_floats && x.format == Format::F32 && !needs_padding &&
              (x.stride[3] == sizeof(float) || k <= 1);
  int64_t n_rows = 1;
  for (int i = 2; i >= 0; --i) {
    extent_[i] = x.stride[i] == 0 ? std::min<int64_t>(x.shape.extent[i], 1) : x.shape.extent[i];
    step_[i] = in_place_ ? x.stride[i] : extent_[i] <= 1 ? 0 : n_rows * row_bytes_;
    n_rows *= extent_[i];
  }
  if (!in_place_) scratch_ = carver.take<std::byte>(n_rows * row_bytes_);
}

void PackedRows::pack(const Tensor& x, const CpuRun& run) {
  base_ = in_place_ ? x.data : scratch_;
  if (in_place_) return;
  const int64_t k = x.shape.extent[3];
  for_items(run, extent_[0] * extent_[1] * extent_[2], 8 * k, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i2 = r % extent_[2];
      const int64_t outer = r / extent_[2];
      pack_row_(x.at(outer / extent_[1], outer % extent_[1], i2), x.format, x.stride[3], k,
                scratch_ + r * row_bytes_);
    }
  });
}

const std::byte* PackedRows::row(int64_t i0, int64_t i1, int64_t i2) const {
  return base_ + i0 * step_[0] + i1 * step_[1] + i2 * step_[2];
}

int64_t tile_rows(const WeightReader& reader, int64_t n_rows, int n_threads) {
  const int64_t fit = kTileCacheBytes / std::max<int64_t>(reader.packed_row_bytes, 1) / 8 * 8;
  int64_t most = std::clamp<int64_t>(fit, 8, kMaxRowsReadAgain);
  if (reader.many_rows) {
    const int64_t n_slabs = std::max<int64_t>(ceil_div(reader.n, reader.granule), 1);
    const int64_t n_tiles = ceil_div(kChunksPerThread * n_threads, n_slabs);
    most = std::clamp<int64_t>(ceil_div(n_rows, n_tiles), kLeastSlabRows, kMaxTileRows);
  }
  // Even tiles: a remainder of one row would read all of w for itself.
  const int64_t n_tiles = std::max<int64_t>(ceil_div(n_rows, most), 1);
  return std::clamp<int64_t>(ceil_div(ceil_div(n_rows, n_tiles), 8) * 8, 1, most);
}

int64_t expert_tile_rows(const WeightReader& reader) {
  return reader.many_rows ? kMaxTileRows : tile_rows(reader, kMaxRowsReadAgain, 1);
}

sys::RowSplit split_columns(const WeightReader& reader, int64_t rows_per_tile, int n_threads,
                            int64_t max_rows) {
  const int64_t granule = reader.granule;
  const int64_t per_column = std::max<int64_t>(reader.k * rows_per_tile, 1);
  sys::RowSplit split =
      sys::split_rows(reader.n, n_threads, granule, ceil_div(kMinChunkProducts, per_column));
  split.rows_per_chunk = std::min(split.rows_per_chunk, ceil_div(max_rows, granule) * granule);
  return split;
}

ExpertTiles::ExpertTiles(const Layout& ids, int64_t n_experts_, Carver& carver)
    : n_tokens(ids.shape.extent[2]), n_slots(ids.shape.extent[3]), n_experts(n_experts_) {
  const int64_t n_pairs = n_tokens * n_slots;
  pairs = carver.take<int64_t>(n_pairs);
  starts = carver.take<int64_t>(n_experts + 1);
  tiles = carver.take<Tile>(n_pairs);
}

void ExpertTiles::group(const Tensor& ids, int64_t rows_per_tile, const char* op) {
  const auto id_at = [&](int64_t t, int64_t a) {
    return int64_t{
        *reinterpret_cast<const int32_t*>(ids.data + t * ids.stride[2] + a * ids.stride[3])};
  };
  std::fill_n(starts, n_experts + 1, 0);
  for (int64_t t = 0; t < n_tokens; ++t) {
    for (int64_t a = 0; a < n_slots; ++a) {
      const int64_t id = id_at(t, a);
      MLA_CHECK_SHAPE(id >= 0 && id < n_experts, op, ": ids[", t, ", ", a, "] is ", id,
                      ", accepted is 0 to ", n_experts - 1);
      ++starts[id + 1];
    }
  }
  for (int64_t e = 0; e < n_experts; ++e) starts[e + 1] += starts[e];
  // Placing a pair moves its expert's start on; afterwards each start is the next one's.
  for (int64_t t = 0; t < n_tokens; ++t) {
    for (int64_t a = 0; a < n_slots; ++a) pairs[starts[id_at(t, a)]++] = t * n_slots + a;
  }
  n_tiles = 0;
  int64_t first = 0;
  for (int64_t e = 0; e < n_experts; ++e) {
    for (; first < starts[e]; ++n_tiles) {
      const int64_t n = std::min(rows_per_tile, starts[e] - first);
      tiles[n_tiles] = {e, first, n};
      first += n;
    }
  }
}

}  // namespace mla::cpu
