// Processors, and the memory that lies next to them.
#include <optional>
#include <utility>

#include "bindings/convert.h"
#include "bindings/register.h"
#include "sys/cgroup.h"
#include "sys/topology.h"

namespace py = pybind11;

namespace mla::bindings {
namespace {

sys::Topology read_topology(const std::string& root,
                            const std::optional<std::pair<std::string, std::vector<int>>>& policy) {
  const py::gil_scoped_release released;
  if (!policy) return sys::read_topology(root);
  const sys::MemoryPolicy given = {policy->first, policy->second};
  return sys::read_topology(root, &given);
}

}  // namespace

void register_topology(py::module_& m) {
  py::class_<sys::CpuPlace>(m, "CpuPlace", "Where a logical CPU is; -1: the kernel does not tell.")
      .def_readonly("cpu", &sys::CpuPlace::cpu)
      .def_readonly("core", &sys::CpuPlace::core, "The lowest CPU of its hardware threads.")
      .def_readonly("package", &sys::CpuPlace::package)
      .def_readonly("l3", &sys::CpuPlace::l3, "The lowest CPU of those that share its L3 cache.");
  py::class_<sys::NumaNode>(m, "NumaNode", "Memory, and the CPUs next to it.")
      .def_readonly("id", &sys::NumaNode::id)
      .def_readonly("cpus", &sys::NumaNode::cpus, "Those that are online.")
      .def_readonly("usable", &sys::NumaNode::usable, "CPUs of the affinity mask, ascending.")
      .def_readonly("total_bytes", &sys::NumaNode::total_bytes)
      .def_readonly("free_bytes", &sys::NumaNode::free_bytes, "Page cache counts as free.")
      .def_readonly("may_allocate", &sys::NumaNode::may_allocate,
                    "It has memory, which the cpuset and a binding policy let this process take.")
      .def_readonly("distance", &sys::NumaNode::distance,
                    "To each node, in their order; empty where it is unknown.");
  py::class_<sys::Topology>(m, "Topology", "Nodes, and what was asked of this thread's memory.")
      .def_readonly("nodes", &sys::Topology::nodes, "Ascending; empty: the kernel shows none.")
      .def_property_readonly(
          "policy",
          [](const sys::Topology& t) { return std::make_pair(t.policy.mode, t.policy.nodes); },
          "(mode, nodes) of set_mempolicy(2); \"unknown\" where it is refused.");
  m.def("read_topology", &read_topology, py::arg("root") = "", py::arg("policy") = std::nullopt,
        "The nodes of this machine, and what of them the calling thread may use. root stands "
        "before /proc and /sys; policy stands for the thread's own.");
  m.def("usable_cpus", &sys::usable_cpus, "Logical CPUs in the affinity mask, ascending.");
  m.def("usable_physical_cores", &sys::usable_physical_cores, py::arg("root") = "",
        "Physical cores in the affinity mask, no more than the cgroup's CPU quota.");
  m.def("cpu_quota_cores", &sys::cpu_quota_cores, py::arg("root") = "",
        "Processor time per time that the cgroup may take, in cores; None: no quota is set.");
}

}  // namespace mla::bindings
