// What is said of devices that cannot be used, or not any more: the same on a device and emulated.
#pragma once

#include <string>
#include <string_view>

#include "backends/cuda/runtime.h"

namespace mla::cuda {

// ---- why there is no device ---------------------------------------------------------------------

enum class Absence {
  no_driver,
  old_driver,  // for the runtime in this module
  hidden,      // or there is none; the driver does not tell the two apart
};
// driver, runtime: as driver_version() and runtime_version(). visible: CUDA_VISIBLE_DEVICES, may be
// null.
std::string absence_text(Absence absence, int driver, int runtime, const char* visible);

// ---- why one cannot be used ---------------------------------------------------------------------

inline constexpr int kOldestCapability = 75;  // tensor cores that multiply f16, with ldmatrix

[[noreturn]] void throw_no_such_device(int index, int count, const std::string& problem);
void check_capability(const DeviceInfo& device);  // throws DeviceError
[[noreturn]] void throw_no_code(const DeviceInfo& device);
[[noreturn]] void throw_out_of_memory(int index, size_t bytes, const DeviceMemory& memory);
[[noreturn]] void throw_out_of_memory(int index, std::string_view what);
[[noreturn]] void throw_out_of_pinned_memory(size_t bytes);

// A kernel went wrong, or the hardware: the process can never use its devices again, not the others
// either, and every call says so.
[[noreturn]] void throw_lost(std::string_view why);

}  // namespace mla::cuda
