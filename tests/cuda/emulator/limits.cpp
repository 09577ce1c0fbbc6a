#include "emulator/limits.h"

#include "base/error.h"

namespace mla::emulator {
namespace {

constexpr size_t kStaticLimitBytes = 48 * 1024;

}  // namespace

void check_limits(const Launch& launch, const KernelSymbols& symbols) {
  const auto& b = launch.block;
  const auto& g = launch.grid;
  const uint64_t n_threads = uint64_t{b.x} * b.y * b.z;
  MLA_CHECK(DeviceError, n_threads >= 1 && n_threads <= kMaxThreads && b.z <= 64,
            "emulator: ", symbols.name, ": a block of ", b.x, " x ", b.y, " x ", b.z, " threads");
  MLA_CHECK(DeviceError, g.x <= 0x7fffffffu && g.y <= 65535 && g.z <= 65535,
            "emulator: ", symbols.name, ": a grid of ", g.x, " x ", g.y, " x ", g.z, " blocks");
  size_t static_bytes = 0;
  for (const SharedVariable& variable : symbols.shared) static_bytes += variable.bytes;
  MLA_CHECK(DeviceError, static_bytes <= kStaticLimitBytes, "emulator: ", symbols.name, ": ",
            static_bytes, " bytes of static shared memory");
  MLA_CHECK(DeviceError, static_bytes + launch.dynamic_smem_bytes <= launch.smem_limit_bytes,
            "emulator: ", symbols.name, ": ", launch.dynamic_smem_bytes,
            " bytes of dynamic shared memory and ", static_bytes, " of static");
}

}  // namespace mla::emulator
