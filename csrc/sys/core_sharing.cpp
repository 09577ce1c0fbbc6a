#include "sys/core_sharing.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>

namespace mla::sys {
namespace {

using std::chrono::microseconds;

// Asking the kernel costs about 0.2 us: next to nothing once in this time.
constexpr microseconds kLookInterval{200};
// A move costs some 10 us; where threads are fewer than cores one is enough for a long time.
constexpr microseconds kMoveInterval{500};
// Linux gives a thread 1.4 to 4 ms before another has its turn, by version, cores and timer.
constexpr microseconds kFirstTurn{2500};
constexpr microseconds kShortestTurn{500};
constexpr microseconds kLongestTurn{4000};

// Times this thread was taken off its core, sched_yield included.
long n_preempted() {
  rusage use;
  return getrusage(RUSAGE_THREAD, &use) == 0 ? use.ru_nivcsw : 0;
}

}  // namespace

CoreSharing::CoreSharing(bool may_move)
    : may_move_(may_move), turn_(kFirstTurn), n_preempted_(n_preempted()) {
  if (!may_move) return;
  const long n_cpus = std::max(sysconf(_SC_NPROCESSORS_CONF), long{CPU_SETSIZE});
  set_bytes_ = CPU_ALLOC_SIZE(n_cpus);
  allowed_.reset(CPU_ALLOC(n_cpus));
  chosen_.reset(CPU_ALLOC(n_cpus));
  may_move_ = allowed_ != nullptr && chosen_ != nullptr &&
              sched_getaffinity(0, set_bytes_, allowed_.get()) == 0;
  if (may_move_) CPU_OR_S(set_bytes_, chosen_.get(), allowed_.get(), allowed_.get());
}

void CoreSharing::between_chunks(int caller_cpu) {
  const auto now = Clock::now();
  if (may_move_ && now >= next_move_ && sched_getcpu() == caller_cpu) leave(caller_cpu, now);
  if (now >= next_look_) give_way(now);
}

void CoreSharing::leave(int cpu, Clock::time_point now) {
  next_move_ = now + kMoveInterval;
  const auto n_cpus = static_cast<int>(set_bytes_ * 8);
  const std::unique_ptr<cpu_set_t, FreeSet> others(CPU_ALLOC(n_cpus));
  if (cpu < 0 || cpu >= n_cpus || others == nullptr) return;
  if (sched_getaffinity(0, set_bytes_, others.get()) != 0) return;
  if (!CPU_EQUAL_S(set_bytes_, others.get(), chosen_.get())) {  // somebody has set it since
    CPU_OR_S(set_bytes_, allowed_.get(), others.get(), others.get());
  }
  CPU_OR_S(set_bytes_, others.get(), allowed_.get(), allowed_.get());
  CPU_CLR_S(cpu, set_bytes_, others.get());
  if (CPU_COUNT_S(set_bytes_, others.get()) == 0) return;
  // Where it is refused (the process's CPUs have changed meanwhile) the thread stays where it is.
  may_move_ = sched_setaffinity(0, set_bytes_, others.get()) == 0;
  if (may_move_) may_move_ = sched_getaffinity(0, set_bytes_, chosen_.get()) == 0;
}

void CoreSharing::give_way(Clock::time_point now) {
  next_look_ = now + kLookInterval;
  const long before = n_preempted();
  if (before != n_preempted_) {  // it came too late
    n_preempted_ = before;
    if (contested_) turn_ = std::max(turn_ * 4 / 5, kShortestTurn);
    contested_ = true;
    on_core_since_ = now;
    return;
  }
  if (!contested_ || now - on_core_since_ < turn_) return;
  sched_yield();
  n_preempted_ = n_preempted();
  contested_ = n_preempted_ != before;  // else nobody wanted the core
  turn_ = std::min(turn_ + kLookInterval / 2, kLongestTurn);
  on_core_since_ = Clock::now();
}

}  // namespace mla::sys
