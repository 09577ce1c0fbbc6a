// Memory on given NUMA nodes, and on which nodes memory lies. By system calls: no library is
// needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>

namespace mla::sys {

enum class NodePolicy {
  bind,       // on these nodes alone: full ones give up page cache first
  prefer,     // on these nodes while they have room (of several, the first)
  interleave  // page by page in turns
};

// Anonymous memory on page boundaries, zero until written, given to nodes as it is first touched.
// Huge pages are asked for.
//
// Where the system refuses to bind (a container without CAP_SYS_NICE, a kernel without NUMA) the
// memory is there all the same, and lies where the threads run that touch it first: note() says so.
// Throws MemoryLimitError, and DeviceError for nodes that do not exist or that the process may not
// use.
class NodeMemory {
 public:
  NodeMemory(int64_t n_bytes, std::span<const int> nodes, NodePolicy policy,
             bool huge_pages = true);
  ~NodeMemory();
  NodeMemory(const NodeMemory&) = delete;
  NodeMemory& operator=(const NodeMemory&) = delete;

  std::byte* data() const { return data_; }
  int64_t size_bytes() const { return size_bytes_; }
  bool bound() const { return note_.empty(); }
  const std::string& note() const { return note_; }  // why it is not bound; "" where it is

 private:
  std::byte* data_ = nullptr;
  int64_t size_bytes_;
  std::string note_;
};

// Gives pages of [begin, begin + n_bytes), widened to whole pages, to nodes from now on; those that
// are there already stay. Returns why it was refused where containers and kernels refuse; throws
// DeviceError for nodes that do not exist or that the process may not use.
std::string bind_memory(const void* begin, int64_t n_bytes, std::span<const int> nodes,
                        NodePolicy policy);

// How many of the pages that [begin, begin + n_bytes) touches lie on each node; -1: on none yet.
// Looks at one address every step_bytes (0: every page), so that memory in huge pages is counted
// faster. Throws DeviceError where the system does not tell.
std::map<int, int64_t> pages_by_node(const void* begin, int64_t n_bytes, int64_t step_bytes = 0);

// Moves pages that lie elsewhere to `nodes` (of several, in turns). Returns how many it moved;
// pages that cannot be moved stay. Throws DeviceError where the system refuses altogether.
int64_t move_strays(const void* begin, int64_t n_bytes, std::span<const int> nodes);

int64_t page_bytes();

}  // namespace mla::sys
