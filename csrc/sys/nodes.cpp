#include "sys/nodes.h"

#include <algorithm>

#include "base/error.h"

namespace mla::sys {
namespace {

__extension__ typedef __int128 Wide;  // weights may be bytes

}  // namespace

void split_rows_over_nodes(int64_t n_rows, std::span<const int64_t> weights, int64_t granule,
                           std::span<int64_t> begins) {
  MLA_CHECK_SHAPE(n_rows >= 0 && granule > 0, "split over nodes: ", n_rows, " rows in units of ",
                  granule);
  int64_t total = 0;
  for (int64_t weight : weights) {
    MLA_CHECK_SHAPE(weight >= 0, "split over nodes: weight ", weight);
    total += weight;
  }
  MLA_CHECK_SHAPE(total > 0, "split over nodes: none of ", weights.size(), " has a weight");
  const int64_t n_granules = (n_rows + granule - 1) / granule;
  int64_t sum = 0;
  begins[0] = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    // Rounded sums, not rounded parts: the error does not grow with the number of parts.
    sum += weights[i];
    const Wide scaled = Wide{n_granules} * sum * 2 + total;
    begins[i + 1] = std::min(static_cast<int64_t>(scaled / (Wide{2} * total)) * granule, n_rows);
  }
}

std::vector<int64_t> split_rows_over_nodes(int64_t n_rows, std::span<const int64_t> weights,
                                           int64_t granule) {
  std::vector<int64_t> begins(weights.size() + 1);
  split_rows_over_nodes(n_rows, weights, granule, begins);
  return begins;
}

}  // namespace mla::sys
