// The reference encoders and decoders, rows shared out to threads.
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "bindings/convert.h"
#include "bindings/register.h"
#include "quant/encode.h"
#include "sys/topology.h"

namespace py = pybind11;

namespace mla::bindings {
namespace {

using FloatRows = py::array_t<float, py::array::c_style>;
using ByteRows = py::array_t<uint8_t, py::array::c_style>;

// Calls body(row) for all rows, on `threads` threads or, where that is 0, one per core; the first
// exception of any thread is thrown here.
template <class Body>
void for_rows(int64_t n_rows, int threads, const Body& body) {
  std::atomic<int64_t> next = 0;
  std::exception_ptr failure;
  std::mutex mutex;
  const auto work = [&] {
    try {
      for (int64_t row = next++; row < n_rows; row = next++) body(row);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
      next = n_rows;
    }
  };
  {
    std::vector<std::jthread> helpers;
    const int64_t wanted = threads > 0 ? threads : sys::usable_physical_cores();
    const int64_t n_threads = std::min(wanted, n_rows);
    for (int64_t i = 1; i < n_threads; ++i) helpers.emplace_back(work);
    work();
  }
  if (failure) std::rethrow_exception(failure);
}

ByteRows quantize(const FloatRows& x, const std::string& name, int threads) {
  const Format format = to_format(name);
  MLA_CHECK_SHAPE(x.ndim() == 2, "quantize: expected [rows, k], got ", x.ndim(), " dimensions");
  const int64_t k = x.shape(1);
  const int64_t n_bytes = row_bytes(format, k);
  ByteRows out({static_cast<py::ssize_t>(x.shape(0)), static_cast<py::ssize_t>(n_bytes)});
  const float* from = x.data();
  auto* to = reinterpret_cast<std::byte*>(out.mutable_data());
  const int64_t n_rows = x.shape(0);
  const py::gil_scoped_release released;
  for_rows(n_rows, threads,
           [&](int64_t row) { encode(format, from + row * k, k, to + row * n_bytes); });
  return out;
}

FloatRows dequantize(const ByteRows& bytes, const std::string& name, int64_t k, int threads) {
  const Format format = to_format(name);
  MLA_CHECK_SHAPE(bytes.ndim() == 2 && k >= 0, "dequantize: expected [rows, row_bytes], got ",
                  bytes.ndim(), " dimensions");
  const int64_t n_bytes = row_bytes(format, k);
  MLA_CHECK_SHAPE(bytes.shape(1) == n_bytes, "dequantize: rows of ", k, " elements in ",
                  format_name(format), " are ", n_bytes, " bytes, got ", bytes.shape(1));
  FloatRows out({static_cast<py::ssize_t>(bytes.shape(0)), static_cast<py::ssize_t>(k)});
  const auto* from = reinterpret_cast<const std::byte*>(bytes.data());
  float* to = out.mutable_data();
  const int64_t n_rows = bytes.shape(0);
  const py::gil_scoped_release released;
  for_rows(n_rows, threads,
           [&](int64_t row) { decode(format, from + row * n_bytes, k, to + row * k); });
  return out;
}

}  // namespace

void register_quant(py::module_& m) {
  m.def(
      "quantize", &quantize, py::arg("x").noconvert(), py::arg("format"), py::arg("threads") = 0,
      "float32 [rows, k], C-contiguous -> uint8 [rows, row_bytes]. 0 threads: one per core. Raises "
      "FormatError for numbers that the format cannot hold, ShapeError where k is no multiple of "
      "the block.");
  m.def("dequantize", &dequantize, py::arg("data").noconvert(), py::arg("format"), py::arg("k"),
        py::arg("threads") = 0,
        "uint8 [rows, row_bytes], C-contiguous -> float32 [rows, k]. 0 threads: one per core.");
}

}  // namespace mla::bindings
