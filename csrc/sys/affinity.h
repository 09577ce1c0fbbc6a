// On which CPUs a thread may run.
#pragma once

#include <sched.h>

#include <cstddef>
#include <memory>
#include <vector>

namespace mla::sys {

// The calling thread runs on these CPUs from now on. False where the system refuses.
bool run_on(const std::vector<int>& cpus);

// The calling thread runs on these CPUs as long as this lives, then where it could before; no CPUs:
// nothing changes.
class RunOn {
 public:
  explicit RunOn(const std::vector<int>& cpus);
  ~RunOn();
  RunOn(const RunOn&) = delete;
  RunOn& operator=(const RunOn&) = delete;

 private:
  struct FreeSet {
    void operator()(cpu_set_t* set) const { CPU_FREE(set); }
  };
  size_t set_bytes_ = 0;
  std::unique_ptr<cpu_set_t, FreeSet> before_;  // null: nothing to restore
};

// Where the calling thread could run when this was made; for that thread alone.
class Affinity {
 public:
  Affinity();
  void restore() const;

 private:
  struct FreeSet {
    void operator()(cpu_set_t* set) const { CPU_FREE(set); }
  };
  size_t set_bytes_;
  std::unique_ptr<cpu_set_t, FreeSet> cpus_;  // null: not known
};

}  // namespace mla::sys
