// Files as memory: mapped or loaded, with the buffer protocol; and how much memory there is.
#include <memory>
#include <optional>

#include "bindings/convert.h"
#include "bindings/register.h"
#include "sys/file.h"
#include "sys/mapped_file.h"
#include "sys/memory.h"
#include "sys/parallel_read.h"

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

sys::PageCache to_page_cache(bool bypass) {
  return bypass ? sys::PageCache::bypass : sys::PageCache::keep;
}

using Progress = std::optional<py::function>;

// Calls progress(arguments(done_bytes)...). Also without one: between two reports Ctrl-C is
// noticed.
template <class Arguments>
sys::ReadProgress make_report(const Progress& progress, Arguments arguments) {
  return [&progress, arguments](std::span<const int64_t> done_bytes) {
    const py::gil_scoped_acquire held;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (progress) (*progress)(*arguments(done_bytes));
  };
}

std::unique_ptr<sys::LoadedFile> load_file(const std::string& path, int threads,
                                           const Progress& progress, bool bypass_cache) {
  const py::gil_scoped_release released;
  const int64_t total_bytes = sys::File(path).size_bytes();
  const auto report = make_report(progress, [total_bytes](std::span<const int64_t> done_bytes) {
    return py::make_tuple(done_bytes.front(), total_bytes);
  });
  return std::make_unique<sys::LoadedFile>(path, threads, to_page_cache(bypass_cache), report);
}

// A team, and the memory that it fills.
struct PyReadTeam {
  sys::ReadTeam team;
  std::vector<py::buffer> memories;
};

void add_runs(PyReadTeam& self, const py::buffer& memory, int64_t out_offset, int file,
              int64_t offset, int64_t n_bytes, int64_t n_runs, int64_t file_stride,
              int64_t out_stride) {
  const py::buffer_info info = memory.request(/*writable=*/true);
  MLA_CHECK_SHAPE(offset >= 0 && out_offset >= 0 && n_bytes >= 0 && n_runs >= 0 && file >= 0 &&
                      file_stride >= 0 && out_stride >= 0,
                  "runs to read: numbers below 0");
  const int64_t end = n_runs == 0 ? 0 : out_offset + (n_runs - 1) * out_stride + n_bytes;
  MLA_CHECK_SHAPE(end <= info.size * info.itemsize, "runs to read end at byte ", end, " of ",
                  info.size * info.itemsize);
  self.team.runs.push_back({file, offset, n_bytes, static_cast<std::byte*>(info.ptr) + out_offset,
                            n_runs, file_stride, out_stride});
  self.memories.push_back(memory);
}

py::list read_in_parallel(const std::vector<std::string>& paths,
                          const std::vector<const PyReadTeam*>& teams, bool bypass_cache,
                          const Progress& progress) {
  std::vector<sys::ReadTeam> given;
  for (const PyReadTeam* team : teams) {
    for (const sys::FileRuns& runs : team->team.runs) {
      MLA_CHECK_SHAPE(static_cast<size_t>(runs.file) < paths.size(), "runs of file ", runs.file,
                      " of ", paths.size());
    }
    given.push_back(team->team);
  }
  std::vector<sys::TeamResult> results;
  {
    const py::gil_scoped_release released;
    const auto report = make_report(progress, [](std::span<const int64_t> done_bytes) {
      return py::make_tuple(std::vector<int64_t>(done_bytes.begin(), done_bytes.end()));
    });
    results = sys::read_in_parallel(paths, given, to_page_cache(bypass_cache), report);
  }
  py::list out;
  for (const sys::TeamResult& r : results) {
    out.append(py::make_tuple(r.n_bytes, r.seconds, r.direct));
  }
  return out;
}

void register_reading(py::module_& m) {
  py::class_<PyReadTeam>(m, "ReadTeam",
                         "Threads that read runs of files into memory, and stay on these CPUs.")
      .def(py::init([](std::vector<int> cpus, int threads) {
             return PyReadTeam{{std::move(cpus), threads, {}}, {}};
           }),
           py::arg("cpus") = std::vector<int>{}, py::arg("threads") = 0,
           "cpus: none for anywhere. threads: 0 for the default.")
      .def("add", &add_runs, py::arg("memory"), py::arg("out_offset"), py::arg("file"),
           py::arg("offset"), py::arg("n_bytes"), py::arg("n_runs") = 1, py::arg("file_stride") = 0,
           py::arg("out_stride") = 0,
           "n_runs runs of n_bytes, at equal distances in the file and in the writable buffer "
           "`memory`. Raises ShapeError outside of it.");
  m.def("read_in_parallel", &read_in_parallel, py::arg("paths"), py::arg("teams"),
        py::arg("bypass_cache") = false, py::arg("progress") = py::none(),
        "All teams read at once. progress(done_bytes of each team) is called from this thread; "
        "what it raises stops the reading. bypass_cache: leave nothing in the page cache. Returns "
        "[(n_bytes, seconds, whether the page cache was bypassed)]. Raises DeviceError.");
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
           py::arg("progress") = py::none(), py::arg("bypass_cache") = false,
           "threads: readers, 0 for the default. progress(done_bytes, total_bytes) is called from "
           "this thread; what it raises stops the reading. bypass_cache: leave nothing in the page "
           "cache, for files that memory cannot hold twice.")
      .def_buffer(&bytes_of<sys::LoadedFile>)
      .def_property_readonly("size", &sys::LoadedFile::size_bytes)
      .def_property_readonly("path", &sys::LoadedFile::path)
      .def(
          "check", [](const sys::LoadedFile&) {}, "Never raises: the bytes are ours.");
}

}  // namespace

void register_memory(py::module_& m) {
  register_files(m);
  register_reading(m);
  m.def("disable_huge_pages", &sys::disable_huge_pages,
        "From now on this process gets no huge pages. Raises DeviceError.");
  m.def("available_memory_bytes", &sys::available_memory_bytes, py::arg("root") = "",
        "Bytes of anonymous memory this process may still take, by machine, cgroups and resource "
        "limits. root stands before /proc and /sys.");
  m.def("is_network_fs", &sys::is_network_fs, py::arg("path"),
        "Whether the file system fetches pages over a network or from a user process.");
}

}  // namespace mla::bindings
