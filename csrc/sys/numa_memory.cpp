#include "sys/numa_memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "base/error.h"
#include "sys/file.h"

namespace mla::sys {
namespace {

// Of linux/mempolicy.h, which is not installed everywhere.
constexpr int kPreferred = 1;
constexpr int kBind = 2;
constexpr int kInterleave = 3;
constexpr int kMoveOwnPages = 1 << 1;  // MPOL_MF_MOVE

// Addresses of one call: 128 KiB of them.
constexpr size_t kPagesPerCall = 16384;

int mode_of(NodePolicy policy) {
  switch (policy) {
    case NodePolicy::bind:
      return kBind;
    case NodePolicy::prefer:
      return kPreferred;
    case NodePolicy::interleave:
      break;
  }
  return kInterleave;
}

std::string list(std::span<const int> nodes) {
  std::string text;
  for (int node : nodes) text += concat(text.empty() ? "" : ", ", node);
  return text;
}

// One bit per node, as the kernel takes it.
std::vector<unsigned long> node_mask(std::span<const int> nodes) {
  constexpr int kWordBits = 8 * sizeof(unsigned long);
  std::vector<unsigned long> mask(1, 0);
  for (int node : nodes) {
    MLA_CHECK(DeviceError, node >= 0 && node < 4096, "NUMA node ", node, " does not exist");
    const auto word = static_cast<size_t>(node / kWordBits);
    if (word >= mask.size()) mask.resize(word + 1, 0);
    mask[word] |= 1UL << (node % kWordBits);
  }
  return mask;
}

struct Range {
  uintptr_t begin, end;  // whole pages
};
Range whole_pages(const void* begin, int64_t n_bytes) {
  const auto page = static_cast<uintptr_t>(page_bytes());
  const auto first = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t last = first + static_cast<uintptr_t>(std::max<int64_t>(n_bytes, 0));
  return {first / page * page, (last + page - 1) / page * page};
}

// Asks for the nodes of pages, or (target != nullptr) moves them, as far as there is room. status:
// a node, or a negative error number.
void call_move_pages(std::span<void*> pages, const int* target, int* status) {
  const long result =
      syscall(SYS_move_pages, 0, pages.size(), pages.data(), target, status, kMoveOwnPages);
  // A positive result counts pages that could not be moved; a full target is an error, although
  // pages before that were moved.
  const bool full = target != nullptr && result < 0 && errno == ENOMEM;
  MLA_CHECK(DeviceError, result >= 0 || full, "NUMA: the system does not ",
            target != nullptr ? "move pages" : "tell the nodes of pages", ": ", os_error(errno));
}

// Calls body(pages, status) for runs of pages, with the node of each.
template <class Body>
void for_pages(const Range& range, uintptr_t step, const Body& body) {
  std::vector<void*> pages;
  std::vector<int> status;
  for (uintptr_t at = range.begin; at < range.end;) {
    pages.clear();
    for (; at < range.end && pages.size() < kPagesPerCall; at += step) {
      pages.push_back(reinterpret_cast<void*>(at));
    }
    status.assign(pages.size(), -1);
    call_move_pages(pages, nullptr, status.data());
    body(std::span<void*>(pages), std::span<const int>(status));
  }
}

}  // namespace

int64_t page_bytes() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

std::string bind_memory(const void* begin, int64_t n_bytes, std::span<const int> nodes,
                        NodePolicy policy) {
  if (nodes.empty()) return "no node was given: it lies where it is first touched";
  const Range range = whole_pages(begin, n_bytes);
  if (range.begin == range.end) return "";
  const std::span<const int> chosen =
      policy == NodePolicy::prefer ? nodes.subspan(0, 1) : nodes;  // the kernel takes one
  const std::vector<unsigned long> mask = node_mask(chosen);
  // The kernel reads one bit less than it is told.
  const unsigned long n_bits = mask.size() * 8 * sizeof(unsigned long) + 1;
  const long result = syscall(SYS_mbind, range.begin, range.end - range.begin, mode_of(policy),
                              mask.data(), n_bits, 0);
  if (result == 0) return "";
  const int error = errno;
  if (error == EPERM || error == ENOSYS || error == EACCES) {
    return concat("memory cannot be bound to NUMA node ", list(nodes), ": ", os_error(error),
                  "; it lies where it is first touched");
  }
  throw DeviceError(
      concat("memory cannot be bound to NUMA node ", list(nodes), ": ", os_error(error)));
}

NodeMemory::NodeMemory(int64_t n_bytes, std::span<const int> nodes, NodePolicy policy,
                       bool huge_pages)
    : size_bytes_(n_bytes) {
  MLA_CHECK_SHAPE(n_bytes >= 0, "memory of ", n_bytes, " bytes");
  if (n_bytes == 0) return;  // mmap refuses empty mappings
  void* memory = mmap(nullptr, static_cast<size_t>(n_bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  MLA_CHECK(MemoryLimitError, memory != MAP_FAILED, "cannot allocate ", n_bytes,
            " bytes: ", os_error(errno));
  data_ = static_cast<std::byte*>(memory);
  try {
    note_ = bind_memory(data_, n_bytes, nodes, policy);
  } catch (const Error&) {
    munmap(memory, static_cast<size_t>(n_bytes));
    throw;
  }
  // Advice: a kernel that has none to give goes on with small pages.
  if (huge_pages) madvise(memory, static_cast<size_t>(n_bytes), MADV_HUGEPAGE);
}

NodeMemory::~NodeMemory() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(size_bytes_));
}

std::map<int, int64_t> pages_by_node(const void* begin, int64_t n_bytes, int64_t step_bytes) {
  const int64_t step = std::max((step_bytes + page_bytes() - 1) / page_bytes(), int64_t{1});
  std::map<int, int64_t> counts;
  for_pages(whole_pages(begin, n_bytes), static_cast<uintptr_t>(step * page_bytes()),
            [&](std::span<void*>, std::span<const int> status) {
              for (int node : status) ++counts[std::max(node, -1)];
            });
  return counts;
}

int64_t move_strays(const void* begin, int64_t n_bytes, std::span<const int> nodes) {
  MLA_CHECK(DeviceError, !nodes.empty(), "NUMA: no node to move pages to");
  int64_t n_moved = 0;
  size_t turn = 0;
  const auto is_stray = [&](int node) {
    return node >= 0 && std::find(nodes.begin(), nodes.end(), node) == nodes.end();
  };
  for_pages(whole_pages(begin, n_bytes), static_cast<uintptr_t>(page_bytes()),
            [&](std::span<void*> pages, std::span<const int> status) {
              std::vector<void*> strays;
              std::vector<int> target;
              for (size_t i = 0; i < pages.size(); ++i) {
                if (!is_stray(status[i])) continue;
                strays.push_back(pages[i]);
                target.push_back(nodes[turn++ % nodes.size()]);
              }
              if (strays.empty()) return;
              std::vector<int> moved(strays.size(), -1);
              call_move_pages(strays, target.data(), moved.data());
              // Where moving ended early, it left no word of what it had moved.
              call_move_pages(strays, nullptr, moved.data());
              for (size_t i = 0; i < moved.size(); ++i) n_moved += moved[i] == target[i];
            });
  return n_moved;
}

}  // namespace mla::sys
