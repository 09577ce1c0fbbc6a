// Tensors over Python buffers, and back.
#include "bindings/convert.h"
#include "bindings/register.h"

namespace py = pybind11;

namespace mla::bindings {
namespace {

void check_fits(const Layout& layout, int64_t offset, int64_t size_bytes) {
  int64_t low = offset;
  int64_t high = offset;
  if (layout.shape.n_elems() == 0) return;
  const FormatTraits& t = traits(layout.format);
  for (int i = 0; i < kMaxRank; ++i) {
    const int64_t steps = i == 3 ? layout.shape.extent[i] / t.block_elems : layout.shape.extent[i];
    int64_t& end = layout.stride[i] < 0 ? low : high;
    int64_t reach = 0;
    const bool fits = !__builtin_mul_overflow(steps - 1, layout.stride[i], &reach) &&
                      !__builtin_add_overflow(end, reach, &end);
    MLA_CHECK_SHAPE(fits, "tensor ", layout, ": stride ", layout.stride[i], " is out of range");
  }
  MLA_CHECK_SHAPE(low >= 0 && high <= size_bytes - t.block_bytes, "tensor ", layout, " at byte ",
                  offset, " reaches bytes ", low, " to ", high + t.block_bytes, " of a buffer of ",
                  size_bytes);
}

// Kernels read whole numbers, and the compiler may count on where they lie. Blocks of quantized
// formats begin with 16-bit numbers, or hold some at even places.
void check_aligned(const Tensor& tensor) {
  const FormatTraits& t = traits(tensor.format);
  if (tensor.shape.n_elems() == 0) return;
  const int64_t unit = t.quantized ? int64_t{sizeof(uint16_t)} : t.block_bytes;
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(unit) == 0;
  for (int i = 0; i < kMaxRank; ++i) {
    aligned = aligned && (tensor.shape.extent[i] == 1 || tensor.stride[i] % unit == 0);
  }
  MLA_CHECK_SHAPE(aligned, "tensor ", static_cast<const Layout&>(tensor),
                  ": address and strides must be multiples of ", unit);
}

Layout make_layout(const std::string& format, const std::vector<int64_t>& shape,
                   const std::optional<std::vector<int64_t>>& strides) {
  Layout layout = Layout::contiguous(to_format(format), to_shape(shape));
  if (strides) {
    MLA_CHECK_SHAPE(strides->size() == shape.size(), "tensor: ", strides->size(),
                    " strides came for ", layout);
    for (size_t i = 0; i < strides->size(); ++i) {
      layout.stride[kMaxRank - shape.size() + i] = (*strides)[i];
    }
    const FormatTraits& t = traits(layout.format);
    MLA_CHECK_SHAPE(!t.quantized || shape.empty() || layout.stride[3] == t.block_bytes, "tensor ",
                    layout, ": blocks must lie side by side, innermost stride ", t.block_bytes);
  }
  return layout;
}

PyTensor make_tensor(const py::buffer& memory, const std::string& format,
                     const std::vector<int64_t>& shape,
                     const std::optional<std::vector<int64_t>>& strides, int64_t offset) {
  const Layout layout = make_layout(format, shape, strides);
  const py::buffer_info info = memory.request();
  // The buffer's own strides say which bytes are valid; only its extent counts here.
  int64_t size_bytes = info.itemsize;
  for (py::ssize_t d = 0; d < info.ndim; ++d) {
    MLA_CHECK_SHAPE(info.strides[static_cast<size_t>(d)] >= 0,
                    "tensor: give the base buffer, not one with negative strides");
    size_bytes = info.size == 0 ? 0
                                : size_bytes + (info.shape[static_cast<size_t>(d)] - 1) *
                                                   info.strides[static_cast<size_t>(d)];
  }
  check_fits(layout, offset, size_bytes);
  const Tensor tensor(layout, static_cast<std::byte*>(info.ptr) + offset);
  check_aligned(tensor);
  return {tensor, memory, !info.readonly, nullptr};
}

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

std::vector<int64_t> dims_of(const Shape& shape) {
  return {shape.dims().begin(), shape.dims().end()};
}

}  // namespace

void check_writable(const char* op, const PyTensor& tensor) {
  MLA_CHECK_SHAPE(tensor.writable, op, ": ", static_cast<const Layout&>(tensor.tensor),
                  " lies in read-only memory");
}

void check_host(const char* op, const PyTensor& tensor) {
  MLA_CHECK(UnsupportedError, tensor.home == nullptr, op, ": ",
            static_cast<const Layout&>(tensor.tensor), " lies in the memory of a device");
}

py::array to_array(const Tensor& tensor, py::object owner) {
  const auto dims = dims_of(tensor.shape);
  std::vector<py::ssize_t> shape(dims.begin(), dims.end());
  std::vector<py::ssize_t> strides;
  for (int i = kMaxRank - tensor.shape.rank; i < kMaxRank; ++i) strides.push_back(tensor.stride[i]);
  py::dtype dtype;
  switch (tensor.format) {
    case Format::F32:
      dtype = py::dtype::of<float>();
      break;
    case Format::I32:
      dtype = py::dtype::of<int32_t>();
      break;
    case Format::F16:
      dtype = py::dtype("float16");
      break;
    case Format::BF16:
      dtype = py::dtype::of<uint16_t>();
      break;
    default:
      dtype = py::dtype::of<uint8_t>();
      shape.back() = row_bytes(tensor.format, tensor.shape.extent[3]);
      strides.back() = 1;
  }
  return py::array(dtype, shape, strides, tensor.data, owner);
}

void register_tensor(py::module_& m) {
  register_device_memory(m);
  py::class_<PyTensor>(m, "Tensor",
                       "A strided view over the memory of a buffer, which it keeps alive.")
      .def(py::init(&make_tensor), py::arg("buffer"), py::arg("format"), py::arg("shape"),
           py::arg("strides_bytes") = std::nullopt, py::arg("offset_bytes") = 0,
           "shape outermost first, at most 4 extents. Strides default to contiguous; for a "
           "quantized format the innermost one is the bytes of a block. Raises ShapeError, "
           "FormatError.")
      .def_property_readonly(
          "format", [](const PyTensor& t) { return std::string(format_name(t.tensor.format)); })
      .def_property_readonly("shape", [](const PyTensor& t) { return dims_of(t.tensor.shape); })
      .def_property_readonly("n_bytes", [](const PyTensor& t) { return t.tensor.span_bytes(); })
      .def(
          "view",
          [](const PyTensor& t) {
            check_host("view", t);
            py::array array = to_array(t.tensor, t.owner);
            if (!t.writable) array.attr("flags").attr("writeable") = false;
            return array;
          },
          "ndarray over the same memory: BF16 as uint16, quantized rows as uint8.");
}

}  // namespace mla::bindings
