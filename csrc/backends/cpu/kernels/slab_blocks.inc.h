// Any part of a quantized weight as a slab: see slab_unpack.inc.h.
#pragma once

#include "backends/cpu/kernels/decode_rows.inc.h"
#include "backends/cpu/kernels/slab_unpack.inc.h"

namespace mla::cpu::MLA_ISA {
namespace {

template <class B>
struct SlabBlock {  // 256 columns
  static constexpr int kScales = kSlabGroups * Slab<B>::halves;
  std::byte q[kSlabWords * kSlabVectors * sizeof(Bytes)];
  float scale[kScales * kSlabRows];
  float min[Slab<B>::has_min ? kScales * kSlabRows : 16];
};
// What is past the end of the rows or of the matrix counts as zero.
template <class B>
__attribute__((noinline)) void unpack_rest(const RawRows& rows, int64_t n_rows, int64_t n_columns,
                                           const SlabOut& out) {
  constexpr int kBlocks = block::kSuper / kBlockElems<B>;
  B padded[kLanes][kBlocks] = {};
  for (int64_t r = 0; r < smaller(n_rows, kLanes); ++r) {
    std::memcpy(padded[r], rows.p + r * rows.stride,
                static_cast<size_t>(n_columns / kBlockElems<B>) * sizeof(B));
  }
  Slab<B>::unpack({reinterpret_cast<const std::byte*>(padded), sizeof padded[0]}, out);
}

// Rows [n, n + kSlabRows) of t's weight, columns [begin, begin + size).
template <class B>
void unpack_slab(const MatmulTile& t, int64_t n, int64_t begin, int64_t size, SlabBlock<B>* slab) {
  const int64_t super_bytes = block::kSuper / kBlockElems<B> * static_cast<int64_t>(sizeof(B));
  for (int v = 0; v < kSlabVectors; ++v) {
    const int64_t row = n + v * kLanes;
    const std::byte* p = t.w + row * t.w_row_bytes + begin / block::kSuper * super_bytes;
    for (int64_t k = 0; k < size; k += block::kSuper, p += super_bytes) {
      SlabBlock<B>& to = slab[k / block::kSuper];
      const SlabOut out = {to.q + v * sizeof(Bytes), to.scale + v * kLanes, to.min + v * kLanes};
      const RawRows rows = {p, t.w_row_bytes};
      if (row + kLanes <= t.n_end && k + block::kSuper <= size) {
        Slab<B>::unpack(rows, out);
      } else {
        unpack_rest<B>(rows, t.n_end - row, smaller(block::kSuper, size - k), out);
      }
    }
  }
}

}  // namespace
}  // namespace mla::cpu::MLA_ISA
