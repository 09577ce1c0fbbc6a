#include "backends/cuda/packed.h"

namespace mla::cuda {
namespace {

using Fields = std::array<Field, kMaxPlanes>;

constexpr std::array<Fields, kFormatCount> kFields = {{
#define MLA_FLOAT(name, gguf, elems, bytes) Fields{},
#define MLA_FORMAT(name, gguf, elems, bytes) PackedPlanes<Format::name>::fields,
#include "quant/formats.def"
    Fields{},  // I32
}};

// Planes hold every byte of a block once. Even offsets and sizes: they are moved two bytes at a
// time.
constexpr bool covers_block(const Fields& fields, int block_bytes) {
  int sum = 0;
  for (const Field& field : fields) {
    if (field.offset % 2 != 0 || field.bytes % 2 != 0) return false;
    if (field.offset + field.bytes > block_bytes) return false;
    sum += field.bytes;
  }
  return sum == block_bytes;
}
#define MLA_FORMAT(name, gguf, elems, bytes) \
  static_assert(covers_block(PackedPlanes<Format::name>::fields, bytes), #name);
#include "quant/formats.def"

bool takes_whole_rows(const Layout& view, int64_t offset_bytes, const Layout& root) {
  if (view.shape.extent[3] != root.shape.extent[3]) return false;
  const int64_t bytes = row_bytes(root.format, root.shape.extent[3]);
  if (bytes == 0) return true;
  if (offset_bytes % bytes != 0) return false;
  for (size_t i = 0; i < kMaxRank - 1; ++i) {
    if (view.shape.extent[i] > 1 && view.stride[i] % bytes != 0) return false;
  }
  return true;
}

}  // namespace

const Fields& packed_fields(Format format) { return kFields[static_cast<size_t>(format)]; }

int64_t packed_row_bytes(Format format, int64_t n_elems) {
  const FormatTraits& t = traits(format);
  if (!t.quantized) return row_bytes(format, n_elems);
  return plane_offset(packed_fields(format), kMaxPlanes, n_elems / t.block_elems);
}

std::string_view packed_refusal(const Node* w) {
  const Root root = root_of(const_cast<Node*>(w));
  if (root.node->op != Op::weight) return "quantized operands must be weights";
  if (!traits(w->format()).quantized) return "the weight is not quantized";
  if (!root.node->layout.is_contiguous()) return "quantized weights must be contiguous";
  if (!takes_whole_rows(w->layout, root.offset_bytes, root.node->layout)) {
    return "views of quantized weights must take whole rows";
  }
  return "";
}

}  // namespace mla::cuda
