#include "backends/cpu/read_log.h"

#include <sched.h>

#include <algorithm>
#include <map>
#include <tuple>

#include "sys/numa_memory.h"

namespace mla::cpu {

void ReadLog::add(int thread, const std::byte* begin, int64_t n_bytes) {
  unsigned cpu = 0;
  unsigned node = 0;
  getcpu(&cpu, &node);
  auto& reads = threads_[static_cast<size_t>(thread)].reads;
  const int from = static_cast<int>(node);
  if (!reads.empty() && reads.back().from == from &&
      reads.back().begin + reads.back().n_bytes == begin) {
    reads.back().n_bytes += n_bytes;
    return;
  }
  reads.push_back({begin, n_bytes, from});
}

std::vector<ReadLog::Traffic> ReadLog::take() {
  std::map<std::tuple<int, int, int>, int64_t> bytes;
  for (size_t i = 0; i < threads_.size(); ++i) {
    for (const Read& read : threads_[i].reads) {
      // Pages at the ends count whole where they are shared out, but the bytes are those read.
      const auto pages = sys::pages_by_node(read.begin, read.n_bytes);
      int64_t n_pages = 0;
      for (const auto& [node, n] : pages) n_pages += n;
      for (const auto& [node, n] : pages) {
        bytes[{static_cast<int>(i), read.from, node}] += read.n_bytes * n / n_pages;
      }
    }
    threads_[i].reads.clear();
  }
  std::vector<Traffic> out;
  for (const auto& [key, n] : bytes) {
    out.push_back({std::get<0>(key), std::get<1>(key), std::get<2>(key), n});
  }
  return out;
}

}  // namespace mla::cpu
