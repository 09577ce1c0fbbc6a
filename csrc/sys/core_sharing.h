// How a worker thread gets along with whatever else runs on the cores.
//
// Chunks are handed out one by one, so a worker that shares its core with another process slows a
// run down only while it is off the core with a chunk in its hands: then everybody waits for it.
// And a worker on the core of its own caller is worse than none.
#pragma once

#include <sched.h>

#include <chrono>
#include <cstddef>
#include <memory>

namespace mla::sys {

// The state of one worker, for its own thread alone.
class CoreSharing {
 public:
  // may_move: whether the CPUs the thread runs on are for the system, and so for us, to choose.
  explicit CoreSharing(bool may_move);

  // To be called where the thread holds no chunk. Leaves caller_cpu to the caller (-1: not known),
  // as long as there is another CPU. Where other work has been taking this core, gives it up before
  // it is taken next, because here nobody waits for it.
  void between_chunks(int caller_cpu);

 private:
  using Clock = std::chrono::steady_clock;
  struct FreeSet {
    void operator()(cpu_set_t* set) const { CPU_FREE(set); }
  };
  void leave(int cpu, Clock::time_point now);
  void give_way(Clock::time_point now);

  bool may_move_;
  size_t set_bytes_ = 0;
  std::unique_ptr<cpu_set_t, FreeSet> allowed_;  // to the thread, by others than itself
  std::unique_ptr<cpu_set_t, FreeSet> chosen_;   // what it made of that itself
  Clock::time_point next_move_;
  Clock::time_point next_look_;
  Clock::time_point on_core_since_;
  std::chrono::microseconds turn_;  // how long it stays before it gives way
  long n_preempted_;
  bool contested_ = false;
};

}  // namespace mla::sys
