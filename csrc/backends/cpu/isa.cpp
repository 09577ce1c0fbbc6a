#include "backends/cpu/isa.h"

#include <array>
#include <cstdlib>

#include "base/error.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(MLA_AMX_EMULATED)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mla::cpu {

#if defined(__x86_64__)
namespace isa_avx2 {
extern const KernelTable kernel_table;
}
namespace isa_avx512vnni {
extern const KernelTable kernel_table;
}
namespace isa_avx512bf16 {
extern const KernelTable kernel_table;
}
namespace isa_avx512amx {
extern const KernelTable kernel_table;
}
#endif
namespace isa_baseline {
extern const KernelTable kernel_table;
}

namespace {

struct Isa {
  const KernelTable* table;
  const char* (*lacks)();  // what this machine lacks, or nullptr; asks CPUID and the OS's XCR0
};

#if defined(__x86_64__)
const char* avx2_lacks() {
  if (!__builtin_cpu_supports("avx2")) return "AVX2";
  if (!__builtin_cpu_supports("fma")) return "FMA";
  if (!__builtin_cpu_supports("f16c")) return "F16C";
  return nullptr;
}

const char* avx512vnni_lacks() {
  if (const char* missing = avx2_lacks()) return missing;
  if (!__builtin_cpu_supports("avx512f")) return "AVX512F";
  if (!__builtin_cpu_supports("avx512bw")) return "AVX512BW";
  if (!__builtin_cpu_supports("avx512vl")) return "AVX512VL";
  if (!__builtin_cpu_supports("avx512dq")) return "AVX512DQ";
  if (!__builtin_cpu_supports("avx512vnni")) return "AVX512_VNNI";
  return nullptr;
}

const char* avx512bf16_lacks() {
  if (const char* missing = avx512vnni_lacks()) return missing;
  return __builtin_cpu_supports("avx512bf16") ? nullptr : "AVX512_BF16";
}

#if defined(MLA_AMX_EMULATED)
const char* tiles_lack() { return nullptr; }
#elif defined(__linux__)
// Tiles are 8 KiB of state per thread, which Linux saves only for processes that asked.
bool linux_grants_tiles() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // the component of XCR0
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
const char* tiles_lack() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return "AMX";
  constexpr uint32_t kTile = uint32_t{1} << 24, kBf16 = uint32_t{1} << 22;  // bits of EDX
  if ((d & kTile) == 0) return "AMX_TILE";
  if ((d & kBf16) == 0) return "AMX_BF16";
  static const bool granted = linux_grants_tiles();
  return granted ? nullptr : "the operating system's permission for AMX";
}
#else
const char* tiles_lack() { return "AMX, which is used under Linux only"; }
#endif

const char* avx512amx_lacks() {
  const char* missing = avx512bf16_lacks();
  return missing != nullptr ? missing : tiles_lack();
}
#endif

const char* baseline_lacks() { return nullptr; }

// Best first.
constexpr auto kIsas = std::to_array<Isa>({
#if defined(__x86_64__)
  {&isa_avx512amx::kernel_table, avx512amx_lacks},
      {&isa_avx512bf16::kernel_table, avx512bf16_lacks},
      {&isa_avx512vnni::kernel_table, avx512vnni_lacks}, {&isa_avx2::kernel_table, avx2_lacks},
#endif
      {&isa_baseline::kernel_table, baseline_lacks},
});

std::string joined(const std::vector<std::string_view>& names) {
  std::string text;
  for (std::string_view name : names) text += concat(text.empty() ? "" : ", ", name);
  return text;
}

}  // namespace

std::vector<std::string_view> compiled_isas() {
  std::vector<std::string_view> names;
  for (const Isa& isa : kIsas) names.push_back(isa.table->isa);
  return names;
}

std::vector<std::string_view> available_isas() {
  std::vector<std::string_view> names;
  for (const Isa& isa : kIsas) {
    if (isa.lacks() == nullptr) names.push_back(isa.table->isa);
  }
  return names;
}

const KernelTable& select_isa(std::string_view request) {
  const char* from_env = std::getenv("MLA_CPU_ISA");
  std::string_view name = request;
  if (name.empty() && from_env != nullptr) name = from_env;
  for (const Isa& isa : kIsas) {
    if (!name.empty() && isa.table->isa != name) continue;
    const char* missing = isa.lacks();
    if (missing == nullptr) return *isa.table;
    MLA_CHECK(UnsupportedError, name.empty(), "ISA '", name, "': this CPU lacks ", missing,
              "; available here: ", joined(available_isas()));
  }
  throw UnsupportedError(
      concat("ISA '", name, "' is unknown; available here: ", joined(available_isas())));
}

}  // namespace mla::cpu
