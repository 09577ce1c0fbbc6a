// Thread pools, backends and executors.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <set>

#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/isa.h"
#include "backends/subset/subset_backend.h"
#include "base/error.h"
#include "bindings/graph_types.h"
#include "bindings/register.h"
#include "exec/executor.h"
#include "sys/affinity.h"

namespace py = pybind11;
using py::arg;

namespace mla::bindings {
namespace {

struct CancelToken {
  std::atomic<bool> cancelled{false};
};

// Looks at a run from the inside: asks for the GIL now and then, so that Ctrl-C and other signals
// reach Python, and says how far the run is.
class RunWatch {
 public:
  RunWatch(const CancelToken* token, const py::object& on_steps, int64_t n_steps)
      : token_(token), on_steps_(on_steps), n_steps_(n_steps) {}

  Checkpoint checkpoint() {
    return Checkpoint([this] { look(); }, &n_done_);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr auto kSignalInterval = std::chrono::milliseconds(20);
  static constexpr auto kReportInterval = std::chrono::milliseconds(250);

  void look() {
    if (token_ != nullptr && token_->cancelled.load(std::memory_order_relaxed)) {
      throw CancelledError("cancelled");
    }
    const auto now = Clock::now();
    if (now < next_signals_) return;
    next_signals_ = now + kSignalInterval;
    const AtHome at_home(home_);
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (on_steps_.is_none() || now < next_report_) return;
    next_report_ = now + kReportInterval;
    on_steps_(n_done_, n_steps_);
  }

  // Threads and processes that Python starts meanwhile inherit where this thread may run: all that
  // the caller may use, not the node that it computes on.
  struct AtHome {
    explicit AtHome(const sys::Affinity& home) { home.restore(); }
    ~AtHome() { here.restore(); }
    sys::Affinity here;
  };

  const sys::Affinity home_;
  const CancelToken* token_;
  const py::object& on_steps_;
  int64_t n_steps_;
  int64_t n_done_ = 0;
  Clock::time_point next_signals_ = Clock::now() + kSignalInterval;
  Clock::time_point next_report_ = Clock::now() + kReportInterval;
};

struct PyExecutor {
  std::shared_ptr<std::vector<py::object>> owners;  // outlive the executor, which uses their memory
  std::unique_ptr<Executor> executor;
};

// What an output may lie in: the arena, or a weight or state of the graph.
struct OutputMemory {
  std::shared_ptr<std::byte> arena;
  std::shared_ptr<std::vector<py::object>> owners;
};

InputData to_input(const std::string& name, const py::array& value) {
  const py::dtype dtype = value.dtype();
  Format format = Format::F32;
  if (dtype.equal(py::dtype::of<int32_t>())) {
    format = Format::I32;
  } else {
    MLA_CHECK(FormatError, dtype.equal(py::dtype::of<float>()), "input '", name, "': dtype ",
              std::string(py::str(dtype)), " came, accepted is float32 or int32");
  }
  MLA_CHECK_SHAPE((value.flags() & py::array::c_style) != 0, "input '", name,
                  "' must be C-contiguous");
  std::vector<int64_t> dims(value.shape(), value.shape() + value.ndim());
  return {name, format, to_shape(dims), value.data()};
}

void run(PyExecutor& self, const py::dict& inputs, const CancelToken* cancel, bool wait,
         const py::object& on_steps) {
  std::vector<std::string> names;
  std::vector<py::array> arrays;
  std::vector<InputData> data;
  names.reserve(inputs.size());
  for (auto [key, value] : inputs) {
    names.push_back(py::cast<std::string>(key));
    arrays.push_back(py::cast<py::array>(value));
    data.push_back(to_input(names.back(), arrays.back()));
  }
  RunWatch watch(cancel, on_steps, self.executor->n_steps());
  const Checkpoint checkpoint = watch.checkpoint();
  const py::gil_scoped_release unlocked;
  wait ? self.executor->run(data, checkpoint) : self.executor->begin(data, checkpoint);
}

py::array output(PyExecutor& self, size_t i) {
  Tensor t;
  {
    const py::gil_scoped_release unlocked;  // it may wait for a device
    t = self.executor->output(i);
  }
  auto hold = std::make_unique<OutputMemory>(
      OutputMemory{self.executor->workspace().arena(kHost).data, self.owners});
  const py::capsule owner(hold.release(), [](void* p) { delete static_cast<OutputMemory*>(p); });
  return to_array(t, owner);
}

// A weight in the memory of a device, and the host's, which the device's copy is known by.
struct Uploaded {
  Buffer buffer;
  py::object owner;
};

Uploaded upload(Workspace& workspace, const Backend& backend, const PyTensor& tensor) {
  const auto& all = workspace.backends();
  const auto found = std::ranges::find_if(all, [&](const auto& b) { return b.get() == &backend; });
  MLA_CHECK(UnsupportedError, found != all.end(), "upload: ", backend.name(),
            " is no backend of the workspace");
  const Domain domain = workspace.domain_of(static_cast<int>(found - all.begin()));
  if (domain == kHost) return {{}, tensor.owner};
  MLA_CHECK(UnsupportedError, tensor.tensor.slices == nullptr, "upload: ", backend.name(),
            " cannot read a tensor that is kept in parts");
  const py::gil_scoped_release unlocked;
  return {workspace.constant(domain, tensor.tensor), tensor.owner};
}

size_t host_bytes(const Workspace& workspace) {
  size_t bytes = workspace.arena(kHost).size_bytes;
  for (size_t b = 0; b < workspace.backends().size(); ++b) {
    const int backend = static_cast<int>(b);
    if (workspace.domain_of(backend) == kHost) bytes += workspace.scratch(backend).size_bytes;
  }
  return bytes;
}

// Why the node runs on `chosen` and not where it was asked to, or else on the first backend; ""
// where it does.
std::string refusal_of(const Node& node, const Backend& chosen,
                       const std::vector<std::shared_ptr<Backend>>& backends) {
  const auto asked = std::ranges::find_if(
      backends, [&](const auto& backend) { return backend->name() == node.device; });
  const Backend& wanted = asked != backends.end() ? **asked : *backends.front();
  if (&wanted == &chosen) return "";
  return concat(wanted.name(), " refuses ", describe(node), ": ",
                wanted.supports_op(node) ? "its state lies elsewhere" : wanted.refusal(node));
}

py::dict report(const PyExecutor& self) {
  const Plan& plan = self.executor->plan();
  const auto& backends = self.executor->workspace().backends();
  py::dict out;
  py::list nodes;
  py::list refusals;
  for (const PlannedStep& step : plan.steps) {
    const Backend& chosen = *backends[static_cast<size_t>(step.backend)];
    nodes.append(py::make_tuple(step.node ? op_name(step.node->op) : "hop", chosen.name()));
    if (step.node == nullptr) continue;
    if (std::string why = refusal_of(*step.node, chosen, backends); !why.empty()) {
      refusals.append(std::move(why));
    }
  }
  const auto on_device = [&](int slot) {
    return plan.slots[static_cast<size_t>(slot)].domain != kHost;
  };
  out["n_direct_copies"] = std::ranges::count_if(plan.steps, [&](const PlannedStep& step) {
    return step.node == nullptr && on_device(step.from_slot) && on_device(step.to_slot);
  });
  int64_t arena = 0;
  int64_t scratch = 0;
  for (int64_t bytes : plan.arena_bytes) arena += bytes;
  for (int64_t bytes : plan.scratch_bytes) scratch += bytes;
  out["arena_bytes"] = arena;
  out["unshared_bytes"] = plan.unshared_bytes;
  out["scratch_bytes"] = scratch;
  out["n_copies"] = plan.n_copies;
  out["steps"] = nodes;
  out["refusals"] = refusals;
  return out;
}

py::dict measure_peak(cpu::CpuBackend& self, size_t read_bytes, int n_repeats) {
  cpu::Peak peak;
  {
    const py::gil_scoped_release unlocked;
    peak = self.measure_peak(read_bytes, n_repeats);
  }
  py::dict out;
  out["read_bytes"] = peak.read_bytes;
  out["f32_ops"] = peak.f32_ops;
  out["int8_ops"] = peak.int8_ops;
  out["bf16_ops"] = peak.bf16_ops;
  return out;
}

int checked_node_of(const sys::ThreadPool& pool, int thread) {
  MLA_CHECK_SHAPE(thread >= 0 && thread < pool.n_threads(), "thread pool: thread ", thread, " of ",
                  pool.n_threads());
  return pool.node_of(thread);
}

std::vector<std::tuple<int, int, int, int64_t>> take_reads(cpu::CpuBackend& self) {
  std::vector<std::tuple<int, int, int, int64_t>> out;
  for (const auto& t : self.take_reads()) out.emplace_back(t.thread, t.from, t.to, t.n_bytes);
  return out;
}

void register_devices(py::module_& m) {
  py::class_<sys::ThreadPool, std::shared_ptr<sys::ThreadPool>>(
      m, "ThreadPool", "Worker threads. n_threads counts the caller; 0: one per physical core.")
      .def(py::init([](int n_threads, std::vector<int> cpus, int spin_us,
                       std::vector<sys::NodeShare> nodes) {
             return std::make_shared<sys::ThreadPool>(
                 sys::ThreadPoolOptions{n_threads, std::move(cpus), spin_us, std::move(nodes)});
           }),
           arg("n_threads") = 0, arg("cpus") = std::vector<int>{}, arg("spin_us") = 50,
           arg("nodes") = std::vector<sys::NodeShare>{},
           "nodes: threads are shared out among them by weight and run on their CPUs; what lies on "
           "a node is read by its threads alone. Raises DeviceError.")
      .def_property_readonly("n_threads", &sys::ThreadPool::n_threads)
      .def_property_readonly("n_nodes", &sys::ThreadPool::n_nodes)
      .def("node_of", &checked_node_of, arg("thread"), "The node, by its index, of a thread.");
  py::class_<Backend, std::shared_ptr<Backend>>(m, "Backend", "Where nodes can run.")
      .def_property_readonly("name", [](const Backend& b) { return std::string(b.name()); })
      .def_property_readonly("shares_host_memory", &Backend::shares_host_memory)
      .def("free_bytes", &Backend::free_bytes, "Free memory of its own; 0 where it has none.")
      .def(
          "refusal",
          [](const Backend& b, const PyNode& node) {
            return b.supports_op(*node.node) ? std::string() : b.refusal(*node.node);
          },
          arg("node"), "Why the node cannot run here; \"\" where it can.")
      .def(
          "supports_op",
          [](const Backend& b, const PyNode& node) { return b.supports_op(*node.node); },
          arg("node"));
  py::class_<cpu::CpuBackend, Backend, std::shared_ptr<cpu::CpuBackend>>(m, "CpuBackend")
      .def(py::init<std::shared_ptr<sys::ThreadPool>, std::string_view>(), arg("pool").none(false),
           arg("isa") = "", "Raises UnsupportedError where this CPU lacks the ISA.")
      .def_property_readonly("isa", [](const cpu::CpuBackend& b) { return std::string(b.isa()); })
      .def_property_readonly("n_threads", &cpu::CpuBackend::n_threads)
      .def_property_readonly("nodes", &cpu::CpuBackend::nodes, "The nodes of its pool, as given.")
      .def("count_reads", &cpu::CpuBackend::count_reads, arg("on"),
           "Whether reads of weights are counted from now on, which costs some time and memory. "
           "Not while a run is on.")
      .def("take_reads", &take_reads,
           "What was read since the last call: [(thread, NUMA node it ran on, NUMA node of the "
           "bytes, bytes)]. Not while a run is on. Raises DeviceError.")
      .def("measure_peak", &measure_peak, arg("read_bytes"), arg("n_repeats"),
           "Rates per second that the threads reach at best: read_bytes of memory, and f32_ops, "
           "int8_ops, bf16_ops, two per multiply-add (0: the ISA has no unit). Takes read_bytes of "
           "memory.");
  py::class_<SubsetBackend, Backend, std::shared_ptr<SubsetBackend>>(
      m, "SubsetBackend", "Another backend restricted to some ops, with memory of its own.")
      .def(py::init<std::shared_ptr<Backend>, std::set<std::string>>(), arg("inner").none(false),
           arg("ops"))
      .def_property_readonly("n_steps", &SubsetBackend::n_steps);
  m.def("compiled_isas", &cpu::compiled_isas, "ISAs in this build, best first.");
  m.def("available_isas", &cpu::available_isas, "Those that this CPU has, best first.");
}

}  // namespace

void register_backends(py::module_& m) {
  register_devices(m);
  py::class_<CancelToken, std::shared_ptr<CancelToken>>(
      m, "CancelToken", "Stops a run, from any thread, before its next node.")
      .def(py::init<>())
      .def("cancel", [](CancelToken& t) { t.cancelled.store(true); })
      .def("reset", [](CancelToken& t) { t.cancelled.store(false); })
      .def_property_readonly("cancelled", [](const CancelToken& t) { return t.cancelled.load(); });
  py::class_<Uploaded>(m, "Uploaded", "A weight in the memory of a device.")
      .def_property_readonly("n_bytes", [](const Uploaded& u) { return u.buffer.size_bytes; });
  py::class_<Workspace, std::shared_ptr<Workspace>>(
      m, "Workspace", "Memory shared by the executors of one model, which run one at a time.")
      .def(py::init<std::vector<std::shared_ptr<Backend>>>(), arg("backends"))
      .def("upload", &upload, arg("backend"), arg("tensor"),
           "A weight as the backend's kernels read it. Executors use it as long as the handle "
           "lives. Raises MemoryLimitError.")
      .def_property_readonly("n_host_bytes", &host_bytes)
      .def_property_readonly("n_bytes", [](const Workspace& w) {
        size_t bytes = 0;
        for (Domain d = 0; d < w.n_domains(); ++d) bytes += w.arena(d).size_bytes;
        for (size_t b = 0; b < w.backends().size(); ++b) {
          bytes += w.scratch(static_cast<int>(b)).size_bytes;
        }
        return bytes;
      });
  py::class_<PyExecutor>(m, "Executor", "A planned graph, run again and again.")
      .def(py::init([](const PyGraph& g, std::shared_ptr<Workspace> workspace) {
             return PyExecutor{g.owners, std::make_unique<Executor>(g.graph, std::move(workspace))};
           }),
           arg("graph"), arg("workspace").none(false),
           "Raises UnsupportedError where no backend has a node.")
      .def("run", &run, arg("inputs"), arg("cancel") = nullptr, arg("wait") = true,
           arg("on_steps") = py::none(),
           "inputs: float32 or int32 arrays by name, C-contiguous. Without wait devices may still "
           "be at work afterwards: what runs next in the workspace comes after it, what fails is "
           "raised there, and there are no outputs. on_steps(done, in all) is called a few times "
           "a second, what it raises stops the run; devices count nothing. Raises CancelledError, "
           "and DeviceError where the workspace is in use.")
      .def("output", &output, arg("index") = 0,
           "View of an output; its values stay until the next run in the workspace. What is due on "
           "demand is copied by the first call after a run. Raises DeviceError where values are "
           "gone.")
      .def("report", &report,
           "arena_bytes, unshared_bytes, scratch_bytes, n_copies, n_direct_copies (from device to "
           "device), steps [(op or \"hop\", backend)], "
           "refusals [why nodes are not where they were wanted].");
}

}  // namespace mla::bindings
