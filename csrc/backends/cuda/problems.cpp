#include "backends/cuda/problems.h"

#include "base/error.h"

namespace mla::cuda {
namespace {

std::string version_name(int version) { return concat(version / 1000, ".", version % 1000 / 10); }

std::string is_a(const DeviceInfo& device) {
  return concat("cuda:", device.index, " (", device.name, "): compute capability ", device.major,
                ".", device.minor);
}

}  // namespace

std::string absence_text(Absence absence, int driver, int runtime, const char* visible) {
  switch (absence) {
    case Absence::no_driver:
      return "no NVIDIA driver is installed";
    case Absence::old_driver:
      return concat("the NVIDIA driver serves CUDA ", version_name(driver),
                    ", and this build needs ", version_name(runtime), ": update the driver");
    case Absence::hidden:
      break;
  }
  if (visible == nullptr) return "there is no CUDA device";
  return concat("there is no CUDA device: CUDA_VISIBLE_DEVICES is '", visible, "'");
}

void throw_no_such_device(int index, int count, const std::string& problem) {
  throw DeviceError(concat("CUDA device ", index,
                           " does not exist: ", count > 0 ? concat("there are ", count) : problem));
}

void check_capability(const DeviceInfo& device) {
  MLA_CHECK(DeviceError, device.capability() >= kOldestCapability, is_a(device), ", accepted is ",
            kOldestCapability / 10, ".", kOldestCapability % 10, " or later");
}

// From 9.0 on, what is best about an architecture is not carried over to the next.
void throw_no_code(const DeviceInfo& device) {
  const int capability = device.capability();
  throw DeviceError(concat(is_a(device), ", for which this build has no code: install it again ",
                           "with MLA_CUDA_ARCHS=", capability,
                           capability >= 90 && capability < 120 ? "a" : "", "-real"));
}

void throw_out_of_memory(int index, size_t bytes, const DeviceMemory& memory) {
  throw MemoryLimitError(concat("cuda:", index, " is out of memory: ", bytes, " bytes asked for, ",
                                memory.free_bytes, " of ", memory.total_bytes, " free"));
}

void throw_out_of_memory(int index, std::string_view what) {
  throw MemoryLimitError(concat("cuda:", index, " is out of memory: ", what));
}

void throw_out_of_pinned_memory(size_t bytes) {
  throw MemoryLimitError(concat("CUDA: cannot pin ", bytes, " bytes of host memory"));
}

void throw_lost(std::string_view why) {
  throw DeviceError(concat("CUDA devices are lost to this process (", why,
                           "): start it again to use them; the CPU still works"));
}

}  // namespace mla::cuda
