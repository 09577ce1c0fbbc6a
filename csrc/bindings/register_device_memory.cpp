// Memory of backends, and tensors in it for graphs.
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
}

}  // namespace mla::bindings
