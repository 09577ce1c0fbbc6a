// Where a kernel's __shared__ variables are. They are thread-local statics, so that they can be
// told from all other statics in the module's symbol table.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace mla::emulator {

struct SharedVariable {
  std::byte* data = nullptr;
  size_t bytes = 0;
};

struct KernelSymbols {
  std::string name = "a kernel without a name";
  std::vector<SharedVariable> shared;  // of the calling host thread; empty where none is known
};

// Reads the symbols of the module that this code is in. A module without them has no names and no
// variables, and is run all the same.
KernelSymbols find_symbols(const void* kernel);

}  // namespace mla::emulator
