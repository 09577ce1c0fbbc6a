// Who still works with which memory. Backends compute on their own time: where two of them use the
// same memory, the later one waits for the earlier one, and the host for neither if it can be
// helped.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "exec/backend.h"

namespace mla {

// What some work does with the memory of a domain of the workspace. Writing includes reading.
struct Use {
  int domain = 0;
  bool writes = false;
};

class Order {
 public:
  Order(std::span<const std::shared_ptr<Backend>> backends, int n_domains);

  // Before the backend is given work: it will begin after what others were given before and must
  // not overlap with it, because one of the two writes where the other reads or writes.
  void enter(int backend, std::span<const Use> uses);
  // After that: others may now follow it.
  void leave(int backend, std::span<const Use> uses);
  // Until nobody works with this memory any more.
  void wait(int domain);
  // Until all have done what they were given.
  void settle();

 private:
  std::shared_ptr<Mark> free_mark(size_t backend);

  // Behind a backend's last work in a domain; null: there is none, or it is done.
  struct Last {
    std::shared_ptr<Mark> read, write;
  };
  std::vector<std::shared_ptr<Backend>> backends_;
  std::vector<std::vector<Last>> last_;                   // [domain][backend]
  std::vector<std::vector<std::shared_ptr<Mark>>> pool_;  // all marks of a backend
  std::vector<bool> busy_;                                // by backend
};

}  // namespace mla
