// Quantized weights as the device holds them: each row as planes, one per field of its blocks.
//
// A block of an odd number of bytes cannot be read 16 bytes at a time. A row of n blocks becomes
// planes of n fields each, padded to 16 bytes, one after the other:
//
//   Q6_K  [ql: n * 128][qh: n * 64][scales: n * 16][d: n * 2, padded]
//
// Rows follow each other, so that any row begins at a multiple of 16 bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "graph/node.h"
#include "quant/blocks.h"

namespace mla::cuda {

inline constexpr int kMaxPlanes = 4;

// A run of bytes of every block. Fields that are read together share a plane.
struct Field {
  int offset = 0;  // in the block
  int bytes = 0;   // 0: no such plane
};

template <Format F>
struct PackedPlanes;  // fields[kMaxPlanes], in the order of the planes

#define MLA_FIELD(type, member) \
  Field { static_cast<int>(offsetof(block::type, member)), sizeof(block::type::member) }
#define MLA_FIELDS(type, first, bytes) \
  Field { static_cast<int>(offsetof(block::type, first)), bytes }
#define MLA_PLANES(type, ...)                                              \
  template <>                                                              \
  struct PackedPlanes<Format::type> {                                      \
    static constexpr std::array<Field, kMaxPlanes> fields = {__VA_ARGS__}; \
  };

MLA_PLANES(Q4_0, MLA_FIELD(Q4_0, qs), MLA_FIELD(Q4_0, d))
MLA_PLANES(Q4_1, MLA_FIELD(Q4_1, qs), MLA_FIELDS(Q4_1, d, 4))
MLA_PLANES(Q5_0, MLA_FIELD(Q5_0, qs), MLA_FIELD(Q5_0, qh), MLA_FIELD(Q5_0, d))
MLA_PLANES(Q5_1, MLA_FIELD(Q5_1, qs), MLA_FIELD(Q5_1, qh), MLA_FIELDS(Q5_1, d, 4))
MLA_PLANES(Q8_0, MLA_FIELD(Q8_0, qs), MLA_FIELD(Q8_0, d))
MLA_PLANES(IQ4_NL, MLA_FIELD(IQ4_NL, qs), MLA_FIELD(IQ4_NL, d))
MLA_PLANES(Q2_K, MLA_FIELD(Q2_K, qs), MLA_FIELD(Q2_K, scales), MLA_FIELDS(Q2_K, d, 4))
MLA_PLANES(Q3_K, MLA_FIELD(Q3_K, qs), MLA_FIELD(Q3_K, hmask), MLA_FIELD(Q3_K, scales),
           MLA_FIELD(Q3_K, d))
MLA_PLANES(Q4_K, MLA_FIELD(Q4_K, qs), MLA_FIELDS(Q4_K, d, 16))
MLA_PLANES(Q5_K, MLA_FIELD(Q5_K, qs), MLA_FIELD(Q5_K, qh), MLA_FIELDS(Q5_K, d, 16))
MLA_PLANES(Q6_K, MLA_FIELD(Q6_K, ql), MLA_FIELD(Q6_K, qh), MLA_FIELD(Q6_K, scales),
           MLA_FIELD(Q6_K, d))
MLA_PLANES(IQ4_XS, MLA_FIELD(IQ4_XS, qs), MLA_FIELDS(IQ4_XS, d, 8))

#undef MLA_PLANES
#undef MLA_FIELDS
#undef MLA_FIELD

constexpr int64_t align16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Where plane `index` of a row of n blocks begins; index kMaxPlanes: where the next row does.
constexpr int64_t plane_offset(const std::array<Field, kMaxPlanes>& fields, int index,
                               int64_t n_blocks) {
  int64_t at = 0;
  for (int i = 0; i < index; ++i) {
    at += align16(fields[static_cast<size_t>(i)].bytes * n_blocks);
  }
  return at;
}
template <Format F>
constexpr int64_t plane_offset(int index, int64_t n_blocks) {
  constexpr std::array<Field, kMaxPlanes> fields = PackedPlanes<F>::fields;  // for device code
  return plane_offset(fields, index, n_blocks);
}
template <Format F>
constexpr int64_t packed_row_bytes(int64_t n_blocks) {
  return plane_offset<F>(kMaxPlanes, n_blocks);
}

// All empty for plain formats.
const std::array<Field, kMaxPlanes>& packed_fields(Format format);
int64_t packed_row_bytes(Format format, int64_t n_elems);

// Empty where `w` can be read packed: a weight, contiguous in the file, or whole rows of one.
std::string_view packed_refusal(const Node* w);

}  // namespace mla::cuda
