// Memory of backends: tensors in it for graphs, and rows of them to and from the host.
#include "bindings/convert.h"
#include "bindings/register.h"

namespace py = pybind11;

namespace mla::bindings {
namespace {

PyTensor make_device_tensor(const py::object& memory, const std::string& format,
                            const std::vector<int64_t>& shape,
                            const std::optional<std::vector<int64_t>>& strides, int64_t offset) {
  const auto& device = py::cast<const DeviceMemory&>(memory);
  const Layout layout = make_layout(format, shape, strides);
  check_fits(layout, offset, static_cast<int64_t>(device.buffer.size_bytes));
  const Tensor tensor(layout, device.buffer.data.get() + offset);
  check_aligned(tensor);
  const bool on_host = device.backend->shares_host_memory();
  return {tensor, memory, true, on_host ? nullptr : device.backend.get()};
}

// Rows `cells` of a plane [cells, width], as runs of neighbours: one copy each.
template <class F>
void for_runs(std::span<const int32_t> cells, const PyTensor& plane, F&& copy_run) {
  const int64_t n_rows = plane.tensor.dim(0);
  for (size_t i = 0; i < cells.size();) {
    size_t end = i + 1;
    while (end < cells.size() && cells[end] == cells[end - 1] + 1) ++end;
    MLA_CHECK_SHAPE(cells[i] >= 0 && cells[end - 1] < n_rows, "cells ", cells[i], " to ",
                    cells[end - 1], " of a plane of ", n_rows);
    copy_run(cells[i], static_cast<int64_t>(i), static_cast<int64_t>(end - i));
    i = end;
  }
}

using Int32s = py::array_t<int32_t, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

// Copies between rows of a device's plane and packed rows in host memory.
void move_rows(const PyTensor& plane, const Int32s& cells, std::byte* host, bool to_host) {
  const auto& device = py::cast<const DeviceMemory&>(plane.owner);
  const Tensor& t = plane.tensor;
  const Layout rows = Layout::contiguous(t.format, Shape{cells.size(), t.dim(1)});
  const std::span<const int32_t> all(cells.data(), static_cast<size_t>(cells.size()));
  const py::gil_scoped_release unlocked;
  for_runs(all, plane, [&](int64_t cell, int64_t first, int64_t n) {
    Tensor there(slice(t, 0, cell, cell + n).layout, t.data + cell * t.stride[2]);
    Tensor here(slice(rows, 0, first, first + n).layout, host + first * rows.stride[2]);
    if (to_host) {
      device.backend->copy(here, there);
    } else {
      device.backend->copy(there, here);
    }
  });
  device.backend->sync();
}

Bytes read_rows(const PyTensor& plane, const Int32s& cells) {
  Bytes out({static_cast<py::ssize_t>(cells.size()),
             static_cast<py::ssize_t>(row_bytes(plane.tensor.format, plane.tensor.dim(1)))});
  move_rows(plane, cells, reinterpret_cast<std::byte*>(out.mutable_data()), true);
  return out;
}

void write_rows(const PyTensor& plane, const Int32s& cells, Bytes rows) {
  const int64_t width = row_bytes(plane.tensor.format, plane.tensor.dim(1));
  MLA_CHECK_SHAPE(rows.size() == cells.size() * width, "write_rows: ", rows.size(), " bytes for ",
                  cells.size(), " rows of ", width);
  move_rows(plane, cells, reinterpret_cast<std::byte*>(rows.mutable_data()), false);
}

}  // namespace

void register_device_memory(py::module_& m) {
  py::class_<DeviceMemory>(m, "DeviceMemory", "Memory of a backend, zeroed.")
      .def(py::init([](std::shared_ptr<Backend> backend, size_t n_bytes) {
             Buffer buffer = backend->alloc(n_bytes, {});
             backend->zero(buffer);
             return DeviceMemory{std::move(backend), std::move(buffer)};
           }),
           py::arg("backend").none(false), py::arg("n_bytes"), "Raises MemoryLimitError.")
      .def_property_readonly("n_bytes", [](const DeviceMemory& d) { return d.buffer.size_bytes; })
      .def("tensor", &make_device_tensor, py::arg("format"), py::arg("shape"),
           py::arg("strides_bytes") = std::nullopt, py::arg("offset_bytes") = 0,
           "A tensor in it, with the rules of Tensor. Only graphs on its backend can use it.");
  m.def("read_rows", &read_rows, py::arg("plane"), py::arg("cells"),
        "Rows of a plane [cells, width] in a DeviceMemory -> uint8 [len(cells), row bytes].");
  m.def("write_rows", &write_rows, py::arg("plane"), py::arg("cells"), py::arg("rows"));
}

}  // namespace mla::bindings
