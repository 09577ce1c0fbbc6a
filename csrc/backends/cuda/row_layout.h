// How small_batch.cuh lays out rows of x: kernels/staged_rows.cuh says what is in them.
#pragma once

#include <cstdint>

namespace mla::cuda {

enum class RowLayout : uint8_t {
  packed,         // f16, in the order of packed weights
  packed_sums32,  // and the sums over each 32
  packed_halves,  // likewise, the second 16 of each 32 divided by 16
  packed_sums16,  // and the sums over each 16
  plain_f16,      // in order
  plain_bf16,
};

inline constexpr int kStagedUnit = 256;  // numbers that a warp converts at a time, 8 per lane

constexpr int staged_units(int k) { return (k + kStagedUnit - 1) / kStagedUnit; }
constexpr int sums_bytes(RowLayout layout) {  // per unit
  switch (layout) {
    case RowLayout::packed_sums32:
    case RowLayout::packed_halves:
      return 32;
    case RowLayout::packed_sums16:
      return 64;
    default:
      return 0;
  }
}
// A staged unit: its numbers, then its sums.
constexpr int staged_unit_bytes(RowLayout layout) { return 2 * kStagedUnit + sums_bytes(layout); }
// From row to row.
constexpr int staged_pitch(RowLayout layout, int k) {
  return staged_units(k) * staged_unit_bytes(layout);
}

}  // namespace mla::cuda
