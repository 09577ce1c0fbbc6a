// Cells of a cache in a device's memory: read, written, moved, turned.
#include "bindings/cuda/register_cells.h"

#include "backends/cuda/cache_shift.h"
#include "bindings/convert.h"

namespace py = pybind11;
using py::arg;

namespace mla::bindings {
namespace {

using cuda::CudaBackend;
using Int32s = py::array_t<int32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

template <class T>
std::span<const T> span_of(const py::array_t<T, py::array::c_style>& values) {
  return {values.data(), static_cast<size_t>(values.size())};
}

const Tensor& own(const CudaBackend& backend, const PyTensor& plane) {
  MLA_CHECK(DeviceError, plane.home == &backend, backend.name(), ": ",
            static_cast<const Layout&>(plane.tensor), " does not lie in its memory");
  return plane.tensor;
}

Bytes read_cells(const CudaBackend& backend, const PyTensor& plane, const Int32s& cells) {
  const Tensor& tensor = own(backend, plane);
  const int64_t width = row_bytes(tensor.format, tensor.shape.extent[3]);
  Bytes rows({static_cast<py::ssize_t>(cells.size()), static_cast<py::ssize_t>(width)});
  auto* out = reinterpret_cast<std::byte*>(rows.mutable_data());
  const auto from = span_of(cells);
  const py::gil_scoped_release unlocked;
  cuda::read_cells(backend, tensor, from, out);
  return rows;
}

void write_cells(const CudaBackend& backend, const PyTensor& plane, const Int32s& cells,
                 const Bytes& rows) {
  const Tensor& tensor = own(backend, plane);
  const int64_t width = row_bytes(tensor.format, tensor.shape.extent[3]);
  MLA_CHECK_SHAPE(rows.size() == cells.size() * width, "write_cells: ", rows.size(), " bytes for ",
                  cells.size(), " rows of ", width);
  const auto to = span_of(cells);
  const auto* in = reinterpret_cast<const std::byte*>(rows.data());
  const py::gil_scoped_release unlocked;
  cuda::write_cells(backend, tensor, to, in);
}

}  // namespace

void register_cells(py::class_<CudaBackend, Backend, std::shared_ptr<CudaBackend>>& backend) {
  backend
      .def("read_cells", &read_cells, arg("plane"), arg("cells"),
           "Rows of a plane [cells, width] in this device's memory -> uint8 [n, row bytes].")
      .def("write_cells", &write_cells, arg("plane"), arg("cells"), arg("rows"), "The reverse.")
      .def(
          "copy_cells",
          [](const CudaBackend& self, const PyTensor& plane, const Int32s& source,
             const Int32s& target) {
            const auto from = span_of(source);
            const auto to = span_of(target);
            const py::gil_scoped_release unlocked;
            cuda::copy_cells(self, own(self, plane), from, to);
          },
          arg("plane"), arg("source"), arg("target"),
          "Row target[i] becomes what row source[i] was; ranges may overlap.")
      .def(
          "rotate_rope",
          [](const CudaBackend& self, const PyTensor& plane, const Int32s& cells,
             const Floats& frequencies, int64_t delta) {
            const auto rows = span_of(cells);
            const auto turns = span_of(frequencies);
            const py::gil_scoped_release unlocked;
            cuda::rotate_rope_rows(self, own(self, plane), rows, turns, delta);
          },
          arg("plane"), arg("cells"), arg("frequencies"), arg("delta"),
          "Turn the rows `cells` of a plane [cells, R] by `delta` positions, in place.");
}

}  // namespace mla::bindings
