// What a launch may ask for.
#pragma once

#include "emulator/block.h"
#include "emulator/shared_memory.h"

namespace mla::emulator {

inline constexpr int kMaxThreads = 1024;  // of a block

// Throws DeviceError.
void check_limits(const Launch& launch, const KernelSymbols& symbols);

}  // namespace mla::emulator
