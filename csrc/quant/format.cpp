#include "quant/format.h"

#include <array>
#include <cctype>

#include "base/error.h"

namespace mla {
namespace {

constexpr std::array<FormatTraits, kFormatCount> kTraits = {{
#define MLA_FLOAT(name, gguf, elems, bytes) {Format::name, #name, gguf, elems, bytes, false},
#define MLA_FORMAT(name, gguf, elems, bytes) {Format::name, #name, gguf, elems, bytes, true},
#include "quant/formats.def"
    {Format::I32, "I32", 26, 1, 4, false},
}};

bool same_ignoring_case(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::tolower(static_cast<unsigned char>(a[i])) !=
        std::tolower(static_cast<unsigned char>(b[i]))) {
      return false;
    }
  }
  return true;
}

}  // namespace

const FormatTraits& traits(Format format) { return kTraits[static_cast<size_t>(format)]; }

std::optional<Format> format_by_name(std::string_view name) {
  for (const FormatTraits& row : kTraits) {
    if (same_ignoring_case(row.name, name)) return row.format;
  }
  return std::nullopt;
}

int64_t row_bytes(Format format, int64_t n_elems) {
  const FormatTraits& t = traits(format);
  MLA_CHECK(ShapeError, n_elems % t.block_elems == 0, t.name, ": row of ", n_elems,
            " elements is no multiple of the block of ", t.block_elems);
  return n_elems / t.block_elems * t.block_bytes;
}

}  // namespace mla
