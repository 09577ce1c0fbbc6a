#include "sys/row_split.h"

#include <algorithm>

namespace mla::sys {

RowSplit split_rows(int64_t n_rows, int n_threads, int64_t granule, int64_t min_rows) {
  // Eight chunks a thread: a thread that loses half its time holds up the rest by 1/16 at most.
  const int64_t wanted = n_threads > 1 ? int64_t{8} * n_threads : 1;
  int64_t rows = std::max((n_rows + wanted - 1) / wanted, min_rows);
  rows = (rows + granule - 1) / granule * granule;
  return {n_rows, std::max<int64_t>(rows, 1)};
}

NodeSplit split_on_nodes(std::span<const int64_t> begins, int64_t rows_per_chunk) {
  NodeSplit split;
  split.n_nodes = static_cast<int>(begins.size()) - 1;
  split.rows_per_chunk = std::max<int64_t>(rows_per_chunk, 1);
  std::copy(begins.begin(), begins.end(), split.rows.begin());
  for (size_t i = 0; i + 1 < begins.size(); ++i) {
    const int64_t n_rows = begins[i + 1] - begins[i];
    split.chunks[i + 1] =
        split.chunks[i] + (n_rows + split.rows_per_chunk - 1) / split.rows_per_chunk;
  }
  return split;
}

}  // namespace mla::sys
