// Tensors over Python buffers, and back.
#include <algorithm>

#include "bindings/convert.h"
#include "bindings/register.h"
#include "sys/nodes.h"

namespace py = pybind11;

namespace mla::bindings {

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

namespace {

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

std::vector<int64_t> dims_of(const Shape& shape) {
  return {shape.dims().begin(), shape.dims().end()};
}

// begins [parts + 1], ascending from 0 to n.
void check_begins(const Layout& layout, const std::vector<int64_t>& begins, int64_t n) {
  const bool whole = begins.size() > 1 && begins.size() <= sys::kMaxNodes + 1 &&
                     begins.front() == 0 && begins.back() == n &&
                     std::is_sorted(begins.begin(), begins.end());
  MLA_CHECK_SHAPE(whole, "tensor ", layout, " in parts: their beginnings must rise from 0 to ", n,
                  ", with 1 to ", sys::kMaxNodes, " parts");
}

// Keeps the slices alive with the memory they describe.
py::object own(Slices slices, const py::object& memory, Tensor& tensor) {
  auto hold = std::make_unique<Slices>(std::move(slices));
  tensor.slices = hold.get();
  const py::capsule capsule(hold.release(), [](void* p) { delete static_cast<Slices*>(p); });
  return py::make_tuple(memory, capsule);
}

PyTensor make_sliced(const std::string& format, const std::vector<int64_t>& shape, int axis,
                     const std::vector<int64_t>& begins,
                     const std::vector<std::pair<py::buffer, int64_t>>& memory) {
  const Layout layout = make_layout(format, shape, std::nullopt);
  const int rank = static_cast<int>(shape.size());
  MLA_CHECK_SHAPE(axis >= 0 && axis < rank - 1 && layout.shape.n_elems() > 0, "tensor ", layout,
                  " cannot be kept in parts along axis ", axis);
  check_begins(layout, begins, layout.dim(axis));
  MLA_CHECK_SHAPE(memory.size() + 1 == begins.size(), "tensor ", layout, ": ", memory.size(),
                  " memories for ", begins.size() - 1, " parts");
  const int64_t step = layout.stride[static_cast<size_t>(kMaxRank - rank + axis)];
  int64_t n_matrices = 1;
  for (int i = 0; i < axis; ++i) n_matrices *= layout.dim(i);
  Slices slices{step * layout.dim(axis), {}, false};
  std::byte* first = nullptr;
  for (size_t i = 0; i < memory.size(); ++i) {
    const py::buffer_info info = memory[i].first.request();
    const int64_t n_bytes = n_matrices * (begins[i + 1] - begins[i]) * step;
    const int64_t at = memory[i].second;
    MLA_CHECK_SHAPE(at >= 0 && at <= info.size * info.itemsize - n_bytes, "tensor ", layout,
                    ": part ", i, " of ", n_bytes, " bytes at byte ", at, " of a buffer of ",
                    info.size * info.itemsize);
    std::byte* data = static_cast<std::byte*>(info.ptr) + at;
    if (n_bytes > 0) check_aligned(Tensor(layout, data));
    slices.parts.push_back({begins[i] * step, begins[i + 1] * step, data});
    if (first == nullptr && n_bytes > 0) first = data;
  }
  PyTensor out{Tensor(layout, first), py::none(), false, nullptr};
  out.owner = own(std::move(slices), py::cast(memory), out.tensor);
  return out;
}

PyTensor with_parts(const PyTensor& whole, const std::vector<int64_t>& begins) {
  const Tensor& t = whole.tensor;
  MLA_CHECK_SHAPE(t.shape.rank == 2 && t.stride[2] > 0 && t.slices == nullptr, "tensor ",
                  static_cast<const Layout&>(t), " cannot be given parts");
  check_begins(t, begins, t.dim(0));
  Slices slices{t.stride[2] * t.dim(0), {}, true};
  for (size_t i = 0; i + 1 < begins.size(); ++i) {
    const int64_t begin = begins[i] * t.stride[2];
    slices.parts.push_back({begin, begins[i + 1] * t.stride[2], t.data + begin});
  }
  PyTensor out = whole;
  out.owner = own(std::move(slices), whole.owner, out.tensor);
  return out;
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
            const Slices* slices = t.tensor.slices;
            MLA_CHECK(UnsupportedError, slices == nullptr || slices->in_place,
                      "view: ", static_cast<const Layout&>(t.tensor), " is kept in parts");
            py::array array = to_array(t.tensor, t.owner);
            if (!t.writable) array.attr("flags").attr("writeable") = false;
            return array;
          },
          "ndarray over the same memory: BF16 as uint16, quantized rows as uint8.")
      .def_static(
          "sliced", &make_sliced, py::arg("format"), py::arg("shape"), py::arg("axis"),
          py::arg("begins"), py::arg("memory"),
          "A weight in parts, one per node: part i holds indices [begins[i], begins[i + 1]) "
          "of `axis` for every index of the axes before it, one after another without gaps, "
          "from byte memory[i][1] of the buffer memory[i][0] on. Products read it as if it "
          "were in one piece. Raises ShapeError.")
      .def("with_parts", &with_parts, py::arg("begins"),
           "The same memory [rows, n], of which node i has rows [begins[i], begins[i + 1]). Raises "
           "ShapeError.");
}

}  // namespace mla::bindings
