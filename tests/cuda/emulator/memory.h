// Memory of the emulated devices, which is the host's.
#pragma once

#include <cstddef>

namespace mla::emulator {

// Whether copies of this memory may be made later: a device's, or pinned. Other host memory is the
// caller's again when the call returns.
bool is_in_place(const void* data);

}  // namespace mla::emulator
