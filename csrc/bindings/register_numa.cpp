// Memory of NUMA nodes, and how rows are shared out among them.
#include <map>
#include <memory>

#include "bindings/convert.h"
#include "bindings/register.h"
#include "sys/nodes.h"
#include "sys/numa_memory.h"

namespace py = pybind11;
using py::arg;

namespace mla::bindings {
namespace {

sys::NodePolicy to_policy(const std::string& name) {
  if (name == "bind") return sys::NodePolicy::bind;
  if (name == "prefer") return sys::NodePolicy::prefer;
  if (name == "interleave") return sys::NodePolicy::interleave;
  throw UnsupportedError(
      concat("NUMA policy '", name, "'; accepted are bind, prefer and interleave"));
}

// The bytes [offset, offset + n_bytes) of a buffer; n_bytes < 0: to its end.
struct Bytes {
  const std::byte* begin;
  int64_t n_bytes;
};
Bytes part_of(const py::buffer& memory, int64_t offset, int64_t n_bytes) {
  const py::buffer_info info = memory.request();
  const int64_t size = info.size * info.itemsize;
  if (n_bytes < 0) n_bytes = size - offset;
  MLA_CHECK_SHAPE(offset >= 0 && n_bytes >= 0 && offset <= size - n_bytes, "bytes ", offset, " to ",
                  offset + n_bytes, " of a buffer of ", size);
  return {static_cast<const std::byte*>(info.ptr) + offset, n_bytes};
}

void register_node_memory(py::module_& m) {
  py::class_<sys::NodeMemory>(
      m, "NodeMemory", py::buffer_protocol(),
      "Anonymous memory on NUMA nodes, zero until written; a writable buffer of uint8 [n_bytes].")
      .def(py::init([](int64_t n_bytes, const std::vector<int>& nodes, const std::string& policy,
                       bool huge_pages) {
             return std::make_unique<sys::NodeMemory>(n_bytes, nodes, to_policy(policy),
                                                      huge_pages);
           }),
           arg("n_bytes"), arg("nodes"), arg("policy") = "bind", arg("huge_pages") = true,
           "policy: bind (these nodes alone), prefer (while they have room) or interleave. No "
           "nodes: where it is first touched. Raises MemoryLimitError, DeviceError.")
      .def_buffer([](sys::NodeMemory& memory) {
        alignas(64) static std::byte nothing{};  // parts without bytes begin like others
        std::byte* data = memory.data() != nullptr ? memory.data() : &nothing;
        return py::buffer_info(data, 1, py::format_descriptor<uint8_t>::format(), 1,
                               {memory.size_bytes()}, {1}, /*readonly=*/false);
      })
      .def_property_readonly("n_bytes", &sys::NodeMemory::size_bytes)
      .def_property_readonly("bound", &sys::NodeMemory::bound)
      .def_property_readonly("note", &sys::NodeMemory::note,
                             "Why it is not bound, where it is not: one sentence, or \"\".");
}

}  // namespace

void register_numa(py::module_& m) {
  py::class_<sys::NodeShare>(m, "NodeShare",
                             "A part of the machine with its own part of the weights: one NUMA "
                             "node, or several that are grouped.")
      .def(py::init([](std::vector<int> nodes, std::vector<int> cpus, int64_t weight) {
             return sys::NodeShare{std::move(nodes), std::move(cpus), weight};
           }),
           arg("nodes"), arg("cpus"), arg("weight"),
           "nodes: where its memory lies; cpus: its CPUs, one of each core first; weight: its part "
           "of rows and threads, cores as a rule.")
      .def_readonly("nodes", &sys::NodeShare::nodes)
      .def_readonly("cpus", &sys::NodeShare::cpus)
      .def_readonly("weight", &sys::NodeShare::weight);
  register_node_memory(m);
  m.def(
      "split_rows_over_nodes",
      [](int64_t n_rows, const std::vector<int64_t>& weights, int64_t granule) {
        return sys::split_rows_over_nodes(n_rows, weights, granule);
      },
      arg("n_rows"), arg("weights"), arg("granule") = 1,
      "Where each node's rows begin, and n_rows at the end: in proportion to the weights, at "
      "multiples of granule. Raises ShapeError.");
  m.def(
      "pages_by_node",
      [](const py::buffer& memory, int64_t offset, int64_t n_bytes, int64_t step_bytes) {
        const Bytes bytes = part_of(memory, offset, n_bytes);
        const py::gil_scoped_release unlocked;
        return sys::pages_by_node(bytes.begin, bytes.n_bytes, step_bytes);
      },
      arg("memory"), arg("offset") = 0, arg("n_bytes") = -1, arg("step_bytes") = 0,
      "How many of the buffer's pages lie on each node, {node: pages}; node -1: not there yet. "
      "Looks at one address every step_bytes (0: every page). Raises DeviceError.");
  m.def(
      "move_strays",
      [](const py::buffer& memory, const std::vector<int>& nodes, int64_t offset, int64_t n_bytes) {
        const Bytes bytes = part_of(memory, offset, n_bytes);
        const py::gil_scoped_release unlocked;
        return sys::move_strays(bytes.begin, bytes.n_bytes, nodes);
      },
      arg("memory"), arg("nodes"), arg("offset") = 0, arg("n_bytes") = -1,
      "Moves pages that lie elsewhere to `nodes`; returns how many. Raises DeviceError.");
  m.def(
      "bind_memory",
      [](const py::buffer& memory, const std::vector<int>& nodes, int64_t offset, int64_t n_bytes,
         const std::string& policy) {
        const Bytes bytes = part_of(memory, offset, n_bytes);
        return sys::bind_memory(bytes.begin, bytes.n_bytes, nodes, to_policy(policy));
      },
      arg("memory"), arg("nodes"), arg("offset") = 0, arg("n_bytes") = -1, arg("policy") = "bind",
      "Gives pages of the buffer that are not there yet to `nodes`; the ends are widened to whole "
      "pages. Returns why the system refused, or \"\". Raises DeviceError.");
  m.def("page_bytes", &sys::page_bytes, "Bytes of a page.");
}

}  // namespace mla::bindings
