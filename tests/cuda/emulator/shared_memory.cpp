#include "emulator/shared_memory.h"

#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string_view>

namespace mla::emulator {
namespace {

// A thread-local that is known both here and in the symbol table tells where the others are.
__attribute__((used)) thread_local char mla_emulator_anchor;

struct Module {
  uintptr_t base = 0;
  std::string path;
};

int find_module(dl_phdr_info* info, size_t, void* out) {
  const auto here = reinterpret_cast<uintptr_t>(&find_module);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& part = info->dlpi_phdr[i];
    const uintptr_t first = info->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_LOAD && here >= first && here < first + part.p_memsz) {
      const std::string_view name = info->dlpi_name;
      *static_cast<Module*>(out) = {info->dlpi_addr,
                                    std::string(name.empty() ? "/proc/self/exe" : name)};
      return 1;
    }
  }
  return 0;
}

struct Symbol {
  uintptr_t value = 0;
  size_t bytes = 0;
};

struct Symbols {
  std::map<uintptr_t, std::string> functions;  // by address
  std::map<std::string, Symbol> locals;        // thread-local, by name
  uintptr_t anchor = 0;
};

template <class T>
const T* at(const std::string& file, size_t offset, size_t count = 1) {
  const bool fits = offset <= file.size() && count <= (file.size() - offset) / sizeof(T);
  return fits ? reinterpret_cast<const T*>(file.data() + offset) : nullptr;
}

void add_section(const std::string& file, const ElfW(Shdr) & section, const ElfW(Shdr) & names,
                 uintptr_t base, Symbols& symbols) {
  const size_t count = section.sh_size / sizeof(ElfW(Sym));
  const auto* all = at<ElfW(Sym)>(file, section.sh_offset, count);
  const char* text = at<char>(file, names.sh_offset, names.sh_size);
  if (all == nullptr || text == nullptr) return;
  for (size_t i = 0; i < count; ++i) {
    const ElfW(Sym)& symbol = all[i];
    if (symbol.st_name >= names.sh_size || symbol.st_shndx == SHN_UNDEF) continue;
    const char* name = text + symbol.st_name;
    const int type = ELF64_ST_TYPE(symbol.st_info);
    if (type == STT_FUNC) symbols.functions[base + symbol.st_value] = name;
    if (type == STT_TLS) symbols.locals[name] = {symbol.st_value, symbol.st_size};
  }
}

Symbols read_symbols() {
  Symbols symbols;
  Module module;
  dl_iterate_phdr(find_module, &module);
  std::ifstream stream(module.path, std::ios::binary);
  const std::string file{std::istreambuf_iterator<char>(stream), {}};
  const auto* header = at<ElfW(Ehdr)>(file, 0);
  if (header == nullptr) return symbols;
  const auto* sections = at<ElfW(Shdr)>(file, header->e_shoff, header->e_shnum);
  if (sections == nullptr) return symbols;
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type == SHT_SYMTAB && sections[i].sh_link < header->e_shnum) {
      add_section(file, sections[i], sections[sections[i].sh_link], module.base, symbols);
    }
  }
  for (const auto& [name, symbol] : symbols.locals) {
    if (name.find("mla_emulator_anchor") != std::string::npos) symbols.anchor = symbol.value;
  }
  return symbols;
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string found = status == 0 ? text : name;
  std::free(text);
  return found;
}

}  // namespace

KernelSymbols find_symbols(const void* kernel) {
  static const Symbols symbols = read_symbols();
  KernelSymbols found;
  const auto function = symbols.functions.find(reinterpret_cast<uintptr_t>(kernel));
  if (function == symbols.functions.end()) return found;
  found.name = demangled(function->second);
  // A static x of the function _Zf is _ZZfE1x.
  const std::string prefix = "_Z" + function->second.substr(1) + "E";
  std::byte* const start = reinterpret_cast<std::byte*>(&mla_emulator_anchor) - symbols.anchor;
  for (auto it = symbols.locals.lower_bound(prefix);
       it != symbols.locals.end() && it->first.starts_with(prefix); ++it) {
    found.shared.push_back({start + it->second.value, it->second.bytes});
  }
  return found;
}

}  // namespace mla::emulator
