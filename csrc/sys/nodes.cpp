#include "sys/nodes.h"

#include <algorithm>

#include "base/error.h"

namespace mla::sys {
namespace {

__extension__ typedef __int128 Wide;  // weights may be bytes

}  // namespace

std::vector<int64_t> split_rows_over_nodes(int64_t n_rows, std::span<const int64_t> weights,
                                           int64_t granule) {
  MLA_CHECK_SHAPE(n_rows >= 0 && granule > 0, "split over nodes: ", n_rows, " rows in units of ",
                  granule);
  int64_t total = 0;
  for (int64_t weight : weights) {
    MLA_CHECK_SHAPE(weight >= 0, "split over nodes: weight ", weight);
    total += weight;
  }
  MLA_CHECK_SHAPE(total > 0, "split over nodes: none of ", weights.size(), " has a weight");
  const int64_t n_granules = (n_rows + granule - 1) / granule;
  std::vector<int64_t> begins = {0};
  int64_t sum = 0;
  for (int64_t weight : weights) {
    // Rounded sums, not rounded parts: the error does not grow with the number of parts.
    sum += weight;
    const Wide scaled = Wide{n_granules} * sum * 2 + total;
    begins.push_back(std::min(static_cast<int64_t>(scaled / (Wide{2} * total)) * granule, n_rows));
  }
  return begins;
}

}  // namespace mla::sys
