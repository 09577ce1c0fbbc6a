// The table of element formats, for mla_backend.formats.
#include <pybind11/stl.h>

#include "bindings/register.h"
#include "quant/format.h"

namespace py = pybind11;

namespace mla::bindings {

void register_formats(py::module_& m) {
  m.def(
      "formats",
      [] {
        py::list rows;
        for (int i = 0; i < kFormatCount; ++i) {
          const FormatTraits& t = traits(static_cast<Format>(i));
          rows.append(
              py::make_tuple(t.name, t.gguf_type, t.block_elems, t.block_bytes, t.quantized));
        }
        return rows;
      },
      "Rows (name, GGUF type id, elements per block, bytes per block, quantized).");
}

}  // namespace mla::bindings
