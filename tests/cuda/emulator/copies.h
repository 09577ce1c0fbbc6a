// A thread's asynchronous copies, which are made as late as they may be.
#pragma once

#include <cstddef>
#include <vector>

namespace mla::emulator {

class Copies {
 public:
  void add(void* to, const void* from, size_t bytes);  // from null: zeros
  void commit();
  void wait(size_t n_groups_left);
  void clear();

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<Copy> pending_;   // oldest first
  std::vector<size_t> groups_;  // sizes of the committed ones, oldest first
  size_t n_open_ = 0;           // not committed yet
};

}  // namespace mla::emulator
