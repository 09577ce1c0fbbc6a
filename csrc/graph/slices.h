// A tensor in parts: each node of the machine keeps its rows of every matrix.
//
// The tensor has the layout it would have in one piece. Offsets into that piece are what strides
// and views speak of; here an offset becomes an address. Parts end between rows, so that a kernel
// that stays within the rows it was given never notices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mla {

struct Slices {
  struct Part {
    int64_t begin, end;  // bytes of each matrix
    std::byte* data;     // of the first matrix; the next one's follow end - begin bytes later
  };
  int64_t matrix_bytes = 0;
  std::vector<Part> parts;  // one per node, in order; together the whole matrix
  // The parts lie behind one another as if there were none: they only say which node has what, and
  // plain addresses are right as well.
  bool in_place = false;

  struct Place {
    std::byte* data;
    int64_t left_bytes;  // from there to the end of the part, in this matrix
    int part;
  };
  Place find(int64_t offset_bytes) const {
    const int64_t matrix = offset_bytes / matrix_bytes;
    const int64_t inner = offset_bytes % matrix_bytes;
    size_t i = 0;
    while (inner >= parts[i].end) ++i;
    const Part& part = parts[i];
    return {part.data + matrix * (part.end - part.begin) + (inner - part.begin), part.end - inner,
            static_cast<int>(i)};
  }
};

}  // namespace mla
