// How rows of weights and cells of the cache are shared out among the nodes of a machine.
//
// Nothing here knows of threads: what splits memory splits work, and a process of its own on each
// node would call the same functions.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mla::sys {

// Parts that anything is split into: what fits one run's tables. Larger machines are grouped.
inline constexpr int kMaxNodes = 32;

// A part of the machine that keeps its share of the weights and computes with it: one NUMA node, or
// several that are grouped.
struct NodeShare {
  std::vector<int> nodes;  // where its memory lies, ascending; empty: wherever it is first touched
  std::vector<int> cpus;   // its CPUs, one of each core first
  int64_t weight = 1;      // its part of rows and threads: cores, as a rule; 0: memory only
};

// begins [weights + 1]: part i has rows [begins[i], begins[i + 1]), in proportion to weights[i],
// each beginning at a multiple of `granule`; the last of them is n_rows. Parts may be empty. Throws
// ShapeError where no weight is above 0, one is below, or granule is not above 0.
std::vector<int64_t> split_rows_over_nodes(int64_t n_rows, std::span<const int64_t> weights,
                                           int64_t granule = 1);
// The same into given memory, [weights + 1].
void split_rows_over_nodes(int64_t n_rows, std::span<const int64_t> weights, int64_t granule,
                           std::span<int64_t> begins);

}  // namespace mla::sys
