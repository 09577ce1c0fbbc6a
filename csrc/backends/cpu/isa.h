// The instruction sets the kernels are built for, and which of them this machine has.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "backends/cpu/kernels.h"

namespace mla::cpu {

// Compiled in, best first: "avx512amx", "avx512bf16", "avx512vnni", "avx2", "baseline" (aarch64:
// "baseline").
std::vector<std::string_view> compiled_isas();
// Those that this CPU and OS can run, best first.
std::vector<std::string_view> available_isas();
// `request` empty: MLA_CPU_ISA if set, else the best available. Throws UnsupportedError naming the
// request, what it lacks, and what is available.
const KernelTable& select_isa(std::string_view request);

}  // namespace mla::cpu
