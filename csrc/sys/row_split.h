// How rows are cut into chunks of work: pure functions, free of threads.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "sys/nodes.h"

namespace mla::sys {

// How to cut n_rows into chunks: enough of them that n_threads stay busy when one is disturbed,
// each a multiple of `granule` rows (but for the last).
struct RowSplit {
  int64_t n_rows;
  int64_t rows_per_chunk;
  int64_t n_chunks() const {
    return rows_per_chunk ? (n_rows + rows_per_chunk - 1) / rows_per_chunk : 0;
  }
  int64_t begin(int64_t chunk) const { return chunk * rows_per_chunk; }
  int64_t end(int64_t chunk) const {
    const int64_t e = (chunk + 1) * rows_per_chunk;
    return e < n_rows ? e : n_rows;
  }
};
RowSplit split_rows(int64_t n_rows, int n_threads, int64_t granule = 1, int64_t min_rows = 1);

// Rows that lie on nodes, cut into chunks of which each has its node.
struct NodeSplit {
  int n_nodes = 1;
  int64_t rows_per_chunk = 1;
  std::array<int64_t, kMaxNodes + 1> rows = {};    // where each node's begin
  std::array<int64_t, kMaxNodes + 1> chunks = {};  // likewise

  int64_t n_chunks() const { return chunks[static_cast<size_t>(n_nodes)]; }
  size_t node_of(int64_t chunk) const {
    size_t node = 0;
    while (chunk >= chunks[node + 1]) ++node;
    return node;
  }
  int64_t begin(int64_t chunk) const {
    const size_t node = node_of(chunk);
    return rows[node] + (chunk - chunks[node]) * rows_per_chunk;
  }
  int64_t end(int64_t chunk) const {
    const size_t node = node_of(chunk);
    const int64_t e = rows[node] + (chunk - chunks[node] + 1) * rows_per_chunk;
    return e < rows[node + 1] ? e : rows[node + 1];
  }
};
// begins [n_nodes + 1]: as of split_rows_over_nodes.
NodeSplit split_on_nodes(std::span<const int64_t> begins, int64_t rows_per_chunk);

}  // namespace mla::sys
