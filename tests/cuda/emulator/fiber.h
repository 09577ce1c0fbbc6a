// Stacks to run a block's threads on, and the switch between them.
#pragma once

#include <cstddef>

#include "emulator/limits.h"

namespace mla::emulator {

// A suspended thread: where its stack stands.
using Context = void*;

// Leaves the running thread as *from and goes on with `to`.
void switch_context(Context* from, Context to);

// Memory for kMaxThreads stacks, each with an inaccessible page below it.
class Stacks {
 public:
  Stacks();
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  // A thread that will start in `entry`, which must not return.
  Context prepare(int index, void (*entry)());

 private:
  std::byte* base_ = nullptr;
};

}  // namespace mla::emulator
