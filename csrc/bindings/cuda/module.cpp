// The extension module of CUDA devices. It adds a backend to those of _core, which is imported
// first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "backends/cuda/cuda_backend.h"
#include "bindings/cuda/register_cells.h"
#include "bindings/register.h"

namespace py = pybind11;
using py::arg;

namespace mla::bindings {
namespace {

py::dict describe(int index) {
  const cuda::DeviceInfo info = cuda::device_info(index);
  cuda::use_device(index);
  py::dict out;
  out["name"] = info.name;
  out["capability"] = py::make_tuple(info.major, info.minor);
  out["n_sm"] = info.n_sm;
  out["l2_bytes"] = info.l2_bytes;
  out["total_bytes"] = info.total_bytes;
  out["free_bytes"] = cuda::device_memory().free_bytes;
  return out;
}

std::vector<std::string> compiled_archs() {
  std::vector<std::string> archs;
  std::istringstream all(MLA_CUDA_ARCHS);
  for (std::string arch; std::getline(all, arch, ',');) archs.push_back(arch);
  return archs;
}

}  // namespace
}  // namespace mla::bindings

PYBIND11_MODULE(MLA_CUDA_MODULE, m) {
  using mla::cuda::CudaBackend;
  m.doc() = "CUDA devices as backends of mla_backend._core.";
  py::module_::import("mla_backend._core");
  mla::bindings::register_errors(m);
  m.def("device_count", &mla::cuda::device_count, "Devices that can be used; 0 where none can.");
  m.def("device_problem", &mla::cuda::device_problem,
        "Why no device can be used; \"\" where one can.");
  m.def("driver_version", &mla::cuda::driver_version, "13000 is 13.0; 0: there is no driver.");
  m.def("runtime_version", &mla::cuda::runtime_version, "Of the runtime in this module.");
  m.def(
      "compiled_archs", &mla::bindings::compiled_archs,
      "Architectures as the build took them: \"90a-real\", or \"80-virtual\" for those after it.");
  m.def("device_info", &mla::bindings::describe, arg("index"),
        "name, capability, n_sm, l2_bytes, total_bytes, free_bytes. Raises DeviceError.");
  py::class_<CudaBackend, mla::Backend, std::shared_ptr<CudaBackend>> backend(m, "CudaBackend");
  backend.def(py::init<int, bool>(), arg("index") = 0, arg("record") = true,
              "record: what runs again is replayed as one recorded graph. Raises DeviceError.");
  mla::bindings::register_cells(backend);
}
