// Files as memory: mapped or loaded, with the buffer protocol; and how much memory there is.
#include <memory>
#include <optional>

#include "bindings/convert.h"
#include "bindings/register.h"
#include "sys/mapped_file.h"
#include "sys/memory.h"

namespace py = pybind11;

namespace mla::bindings {
namespace {

// Views hold a reference to the Python object, so the memory outlives them.
template <class File>
py::buffer_info bytes_of(const File& file) {
  static const std::byte kNothing{};
  const std::byte* data = file.data() != nullptr ? file.data() : &kNothing;
  return py::buffer_info(const_cast<std::byte*>(data), 1, py::format_descriptor<uint8_t>::format(),
                         1, {file.size_bytes()}, {1}, /*readonly=*/true);
}

std::unique_ptr<sys::LoadedFile> load_file(const std::string& path, int threads,
                                           const std::optional<py::function>& progress) {
  // Also without a callback: between two reports Ctrl-C is noticed.
  const sys::ReadProgress report = [&progress](int64_t done_bytes, int64_t total_bytes) {
    const py::gil_scoped_acquire held;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (progress) (*progress)(done_bytes, total_bytes);
  };
  const py::gil_scoped_release released;
  return std::make_unique<sys::LoadedFile>(path, threads, report);
}

void register_files(py::module_& m) {
  py::class_<sys::MappedFile>(m, "MappedFile", py::buffer_protocol(),
                              "A file mapped read-only; a buffer of uint8 [size]. Pages that the "
                              "file loses read as zeros, and check() then raises.")
      .def(py::init([](const std::string& path, bool mlock) {
             const py::gil_scoped_release released;  // locking reads the whole file
             return std::make_unique<sys::MappedFile>(path, mlock);
           }),
           py::arg("path"), py::arg("mlock") = false)
      .def_buffer(&bytes_of<sys::MappedFile>)
      .def_property_readonly("size", &sys::MappedFile::size_bytes)
      .def_property_readonly("path", &sys::MappedFile::path)
      .def("check", &sys::MappedFile::check,
           "Raises DeviceError if the file shrank or could not be read.")
      .def("prefetch", &sys::MappedFile::prefetch, py::arg("offset"), py::arg("n_bytes"),
           py::call_guard<py::gil_scoped_release>(), "Brings these bytes into memory.");
  py::class_<sys::LoadedFile>(m, "LoadedFile", py::buffer_protocol(),
                              "A file read into memory by several threads; a read-only buffer of "
                              "uint8 [size].")
      .def(py::init(&load_file), py::arg("path"), py::arg("threads") = 0,
           py::arg("progress") = py::none(),
           "threads: readers, 0 for the default. progress(done_bytes, total_bytes) is called from "
           "this thread; what it raises stops the reading.")
      .def_buffer(&bytes_of<sys::LoadedFile>)
      .def_property_readonly("size", &sys::LoadedFile::size_bytes)
      .def_property_readonly("path", &sys::LoadedFile::path)
      .def(
          "check", [](const sys::LoadedFile&) {}, "Never raises: the bytes are ours.");
}

}  // namespace

void register_memory(py::module_& m) {
  register_files(m);
  m.def("available_memory_bytes", &sys::available_memory_bytes, py::arg("root") = "",
        "Bytes of anonymous memory this process may still take, by machine, cgroups and resource "
        "limits. root stands before /proc and /sys.");
  m.def("is_network_fs", &sys::is_network_fs, py::arg("path"),
        "Whether the file system fetches pages over a network or from a user process.");
}

}  // namespace mla::bindings
