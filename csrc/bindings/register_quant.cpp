// Rows of numbers to rows of weights and back, shared out to threads.
#include <atomic>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>

#include "backends/cpu/isa.h"
#include "backends/cpu/recode.h"
#include "bindings/convert.h"
#include "bindings/register.h"
#include "quant/decode.h"
#include "sys/topology.h"

namespace py = pybind11;
using py::arg;

namespace mla::bindings {
namespace {

using FloatRows = py::array_t<float, py::array::c_style>;
using ByteRows = py::array_t<uint8_t, py::array::c_style>;

// Elements that a thread takes at a time: whole blocks of every format, small enough that what is
// decoded is still in the core's cache when it is encoded.
constexpr int64_t kPieceElems = 1 << 14;

// Calls body(begin, end) for pieces of [0, n), on `threads` threads or, where that is 0, one per
// core; the first exception of any thread is thrown here.
template <class Body>
void for_pieces(int64_t n, int threads, const Body& body) {
  const int64_t n_pieces = (n + kPieceElems - 1) / kPieceElems;
  std::atomic<int64_t> next = 0;
  std::exception_ptr failure;
  std::mutex mutex;
  const auto work = [&] {
    try {
      for (int64_t i = next++; i < n_pieces; i = next++) {
        body(i * kPieceElems, std::min(n, (i + 1) * kPieceElems));
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
      next = n_pieces;
    }
  };
  {
    std::vector<std::jthread> helpers;
    const int64_t wanted = threads > 0 ? threads : sys::usable_physical_cores();
    const int64_t n_threads = std::min(wanted, n_pieces);
    for (int64_t i = 1; i < n_threads; ++i) helpers.emplace_back(work);
    work();
  }
  if (failure) std::rethrow_exception(failure);
}

int64_t bytes_of(Format format, int64_t n) {
  const FormatTraits& t = traits(format);
  return n / t.block_elems * t.block_bytes;
}

ByteRows new_rows(int64_t n_rows, int64_t n_bytes) {
  return ByteRows({static_cast<py::ssize_t>(n_rows), static_cast<py::ssize_t>(n_bytes)});
}

void check_rows(const ByteRows& bytes, Format format, int64_t k) {
  MLA_CHECK_SHAPE(bytes.ndim() == 2 && k >= 0, "dequantize: expected [rows, row_bytes], got ",
                  bytes.ndim(), " dimensions");
  const int64_t n_bytes = row_bytes(format, k);
  MLA_CHECK_SHAPE(bytes.shape(1) == n_bytes, "dequantize: rows of ", k, " elements in ",
                  format_name(format), " are ", n_bytes, " bytes, got ", bytes.shape(1));
}

std::vector<float> to_importance(const std::optional<FloatRows>& given, int64_t k) {
  if (!given) return {};
  MLA_CHECK_SHAPE(given->ndim() == 1 && given->shape(0) == k, "quantize: importance must be [", k,
                  "], one number per column");
  return cpu::normalized_importance(given->data(), k);
}

// Where rows are encoded to, with what every piece of them shares.
struct Encoding {
  const cpu::KernelTable& kernels;
  Format format;
  int64_t k;
  std::vector<float> importance;
  std::byte* out;

  void encode(const float* x, int64_t begin, int64_t end) const {
    const float* weights = importance.empty() ? nullptr : importance.data();
    cpu::encode(kernels, format,
                {x, end - begin, weights, k, begin, out + bytes_of(format, begin)});
  }
};

ByteRows quantize(const FloatRows& x, const std::string& name,
                  const std::optional<FloatRows>& importance, int threads) {
  const Format format = to_format(name);
  MLA_CHECK_SHAPE(x.ndim() == 2, "quantize: expected [rows, k], got ", x.ndim(), " dimensions");
  const int64_t k = x.shape(1);
  ByteRows out = new_rows(x.shape(0), row_bytes(format, k));
  const Encoding encoding = {cpu::select_isa(""), format, k, to_importance(importance, k),
                             reinterpret_cast<std::byte*>(out.mutable_data())};
  const float* from = x.data();
  const int64_t n = x.size();
  const py::gil_scoped_release released;
  for_pieces(n, threads,
             [&](int64_t begin, int64_t end) { encoding.encode(from + begin, begin, end); });
  return out;
}

FloatRows dequantize(const ByteRows& bytes, const std::string& name, int64_t k, int threads) {
  const Format format = to_format(name);
  check_rows(bytes, format, k);
  FloatRows out({bytes.shape(0), static_cast<py::ssize_t>(k)});
  const auto* from = reinterpret_cast<const std::byte*>(bytes.data());
  float* to = out.mutable_data();
  const int64_t n = out.size();
  const py::gil_scoped_release released;
  for_pieces(n, threads, [&](int64_t begin, int64_t end) {
    decode(format, from + bytes_of(format, begin), end - begin, to + begin);
  });
  return out;
}

ByteRows requantize(const ByteRows& bytes, const std::string& source, int64_t k,
                    const std::string& target, const std::optional<FloatRows>& importance,
                    int threads) {
  const Format from_format = to_format(source);
  const Format format = to_format(target);
  check_rows(bytes, from_format, k);
  ByteRows out = new_rows(bytes.shape(0), row_bytes(format, k));
  const Encoding encoding = {cpu::select_isa(""), format, k, to_importance(importance, k),
                             reinterpret_cast<std::byte*>(out.mutable_data())};
  const auto* from = reinterpret_cast<const std::byte*>(bytes.data());
  const int64_t n = bytes.shape(0) * k;
  const py::gil_scoped_release released;
  for_pieces(n, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> x(static_cast<size_t>(end - begin));
    cpu::decode(encoding.kernels, from_format, from + bytes_of(from_format, begin), end - begin,
                x.data());
    encoding.encode(x.data(), begin, end);
  });
  return out;
}

}  // namespace

void register_quant(py::module_& m) {
  m.def("quantize", &quantize, arg("x").noconvert(), arg("format"),
        arg("importance").noconvert() = py::none(), arg("threads") = 0,
        "float32 [rows, k], C-contiguous -> uint8 [rows, row_bytes], the same bytes on every "
        "machine. importance: float32 [k], how much the squared error of each column counts. 0 "
        "threads: one per core. Raises FormatError for numbers that the format cannot hold and for "
        "importance that is negative or not finite, ShapeError where k is no multiple of the "
        "block.");
  m.def("dequantize", &dequantize, arg("data").noconvert(), arg("format"), arg("k"),
        arg("threads") = 0,
        "uint8 [rows, row_bytes], C-contiguous -> float32 [rows, k]. 0 threads: one per core.");
  m.def("requantize", &requantize, arg("data").noconvert(), arg("source"), arg("k"), arg("target"),
        arg("importance").noconvert() = py::none(), arg("threads") = 0,
        "uint8 [rows, row_bytes] in the format `source` -> uint8 [rows, row_bytes] in `target`: "
        "quantize(dequantize(data)) without the floats between.");
}

}  // namespace mla::bindings
