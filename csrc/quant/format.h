// The element formats a tensor can have, and their traits, expanded from formats.def.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace mla {

enum class Format : uint8_t {
#define MLA_FLOAT(name, gguf, elems, bytes) name,
#define MLA_FORMAT(name, gguf, elems, bytes) name,
#include "quant/formats.def"
  I32,  // token ids, positions, cell numbers; never a weight
};

inline constexpr int kFormatCount = static_cast<int>(Format::I32) + 1;

struct FormatTraits {
  Format format;
  std::string_view name;
  int gguf_type;
  int64_t block_elems;
  int64_t block_bytes;
  bool quantized;
};

const FormatTraits& traits(Format format);
std::optional<Format> format_by_name(std::string_view name);  // any case
inline std::string_view format_name(Format format) { return traits(format).name; }

// Bytes of `n_elems` contiguous elements; n_elems must be a multiple of the block.
int64_t row_bytes(Format format, int64_t n_elems);

}  // namespace mla
