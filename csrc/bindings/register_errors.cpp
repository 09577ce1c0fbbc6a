// C++ exceptions become the classes of mla_backend.errors.
#include "base/error.h"
#include "bindings/register.h"

namespace py = pybind11;

namespace mla::bindings {
namespace {

void raise(const char* class_name, const char* message) {
  const py::object type = py::module_::import("mla_backend.errors").attr(class_name);
  PyErr_SetString(type.ptr(), message);
}

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const ShapeError& e) {
    raise("ShapeError", e.what());
  } catch (const UnsupportedError& e) {
    raise("UnsupportedError", e.what());
  } catch (const FormatError& e) {
    raise("FormatError", e.what());
  } catch (const DeviceError& e) {
    raise("DeviceError", e.what());
  } catch (const MemoryLimitError& e) {
    raise("MemoryLimitError", e.what());
  } catch (const CancelledError& e) {
    raise("CancelledError", e.what());
  } catch (const Error& e) {
    raise("MlaError", e.what());
  }
}

}  // namespace

void register_errors(py::module_&) { py::register_local_exception_translator(translate); }

}  // namespace mla::bindings
