// How small_batch.cuh lays out rows of x: kernels/staged_rows.cuh says what is in them.
#pragma once

#include <cstdint>

namespace mla::cuda {

enum class RowLayout : uint8_t {
  packed,         // f16, in the order of packed weights
  packed_sums32,  // and the sums over each 32
  packed_sums16,  // and the sums over each 16
  plain_f16,      // in order
  plain_bf16,
};

inline constexpr int kStagedUnit = 256;  // numbers that a warp converts at a time, 8 per lane

constexpr int staged_units(int k) { return (k + kStagedUnit - 1) / kStagedUnit; }
constexpr int sums_bytes(RowLayout layout) {  // per unit
  return layout == RowLayout::packed_sums32 ? 32 : layout == RowLayout::packed_sums16 ? 64 : 0;
}
// From row to row: an odd multiple of 64 bytes, so that the two rows which eight lanes read 64
// bytes of lie in different banks.
constexpr int staged_pitch(RowLayout layout, int k) {
  const int bytes = staged_units(k) * (2 * kStagedUnit + sums_bytes(layout));
  return (bytes + 127) / 128 * 128 + 64;
}

}  // namespace mla::cuda
