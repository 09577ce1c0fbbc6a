// Streams, events and recorded graphs of the emulated devices.
//
// Work is done at once; or, with MLA_EMULATOR_LATE, when somebody waits for it, so that what nobody
// waits for as he must is not there when he reads it.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

namespace mla::emulator {

using Work = std::function<void()>;

struct EmulatedStream {
  int device = 0;
  bool recording = false;
  std::vector<Work> recorded;
  std::deque<Work> waiting;
  uint64_t n_given = 0, n_done = 0;

  void give(Work work);
  void do_until(uint64_t n);  // what was given to it first
};

// Does what is left on all streams; what goes wrong is told to who waits for it next.
void finish_all_streams() noexcept;

}  // namespace mla::emulator
