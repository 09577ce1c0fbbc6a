// Conversions that several register_* files need.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "exec/backend.h"
#include "graph/tensor.h"

namespace mla::bindings {

inline Format to_format(const std::string& name) {
  const auto found = format_by_name(name);
  if (!found) {
    std::string known;
    for (int i = 0; i < kFormatCount; ++i) {
      known += concat(i ? ", " : "", format_name(static_cast<Format>(i)));
    }
    throw FormatError(concat("format '", name, "' is unknown; accepted are ", known));
  }
  return *found;
}

inline Shape to_shape(const std::vector<int64_t>& dims) {
  return Shape(std::span<const int64_t>(dims));
}

// A Tensor over memory that a Python object owns.
struct PyTensor {
  Tensor tensor;
  pybind11::object owner;
  bool writable;
  const void* home = nullptr;  // the backend whose memory it is; null: host memory
};

// Memory of a backend, for tensors in it.
struct DeviceMemory {
  std::shared_ptr<Backend> backend;
  Buffer buffer;
};

// Throws UnsupportedError where the host cannot read the memory.
void check_host(const char* op, const PyTensor& tensor);

Layout make_layout(const std::string& format, const std::vector<int64_t>& shape,
                   const std::optional<std::vector<int64_t>>& strides);
// Throw ShapeError where a tensor reaches outside its buffer, or its elements are not aligned.
void check_fits(const Layout& layout, int64_t offset, int64_t size_bytes);
void check_aligned(const Tensor& tensor);
// Throws ShapeError where the memory is read-only.
void check_writable(const char* op, const PyTensor& tensor);

// "F32" as float32, "I32" as int32, "F16" as float16; the others as rows of bytes.
pybind11::array to_array(const Tensor& tensor, pybind11::object owner);

}  // namespace mla::bindings
