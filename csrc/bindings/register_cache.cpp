// Moving and turning cells of the latent cache.
#include "backends/cpu/cache_shift.h"
#include "backends/cpu/cpu_backend.h"
#include "bindings/convert.h"
#include "bindings/register.h"

namespace py = pybind11;
using py::arg;

namespace mla::bindings {
namespace {

using Int32s = py::array_t<int32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

template <class T>
std::span<const T> span_of(const py::array_t<T, py::array::c_style>& values) {
  return {values.data(), static_cast<size_t>(values.size())};
}

}  // namespace

void register_cache(py::module_& m) {
  m.def(
      "rotate_rope",
      [](const cpu::CpuBackend& backend, const PyTensor& plane, const Int32s& cells,
         const Floats& frequencies, int64_t delta) {
        check_writable("rotate_rope", plane);
        check_host("rotate_rope", plane);
        const auto rows = span_of(cells);
        const auto turns = span_of(frequencies);
        const py::gil_scoped_release unlocked;
        cpu::rotate_rope_rows(backend.kernels(), plane.tensor, rows, turns, delta);
      },
      arg("backend"), arg("plane"), arg("cells"), arg("frequencies"), arg("delta"),
      "Turn the rows `cells` of a plane [cells, R] by `delta` positions, in place.");
  m.def(
      "copy_cells",
      [](const PyTensor& plane, const Int32s& source, const Int32s& target) {
        check_writable("copy_cells", plane);
        check_host("copy_cells", plane);
        const auto from = span_of(source);
        const auto to = span_of(target);
        const py::gil_scoped_release unlocked;
        cpu::copy_cells(plane.tensor, from, to);
      },
      arg("plane"), arg("source"), arg("target"),
      "Row target[i] becomes what row source[i] was; ranges may overlap.");
}

}  // namespace mla::bindings
