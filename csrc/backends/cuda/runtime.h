// All use of the CUDA runtime: devices, memory, copies, streams, events, recorded graphs, launches.
// Everything here throws DeviceError or MemoryLimitError; an error that the device survives leaves
// the process usable. Kernels and operations see nothing of the runtime beyond this file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

#ifdef MLA_CUDA_EMULATE
#include <emulator/launch.h>
#else
#include <cuda_runtime_api.h>

namespace mla::cuda {
using Stream = cudaStream_t;
}
#endif

namespace mla {
struct Step;
}

namespace mla::cuda {

struct DeviceInfo {
  int index = 0;
  std::string name;
  int major = 0, minor = 0;
  int n_sm = 0;
  size_t l2_bytes = 0;
  size_t smem_per_block = 0;  // dynamic, the most that a kernel can ask for
  size_t total_bytes = 0;
  int capability() const { return 10 * major + minor; }
};

// When a kernel waits for those ahead of it.
enum class Overlap : uint8_t {
  waits_first,  // before it touches what they write
  waits_last,   // at its end: the one ahead of it writes nothing that it reads or writes, and has
                // waited for all before
};

// Steps before an operation that its kernels do as well; null: none. See fusion.h.
struct Neighbours {
  const Step* norm = nullptr;  // of its row
  const Step* rope = nullptr;  // of its queries, or of its keys
};

// What an operation needs to enqueue its kernels.
struct CudaRun {
  const DeviceInfo& device;
  Stream stream;
  std::byte* scratch;
  Neighbours neighbours = {};
  Overlap overlap = Overlap::waits_first;
};

// ---- devices ------------------------------------------------------------------------------------

int device_count();            // 0 where none is usable
std::string device_problem();  // why it is 0; empty where it is not
int driver_version();          // 13000 is 13.0, the newest runtime that it serves; 0: no driver
int runtime_version();         // of the runtime linked into this module
DeviceInfo device_info(int index);
void use_device(int index);  // for what this thread does next
bool enable_peer(int index,
                 int peer);  // `index` reads and writes memory of `peer`; false: it can't

struct DeviceMemory {
  size_t free_bytes = 0, total_bytes = 0;
};
DeviceMemory device_memory();  // of the device in use

// ---- memory -------------------------------------------------------------------------------------

// On the device in use, aligned to 256 bytes; nothing in it is defined.
std::byte* alloc_device(size_t bytes);
void free_device(std::byte* data) noexcept;  // null: nothing to do
std::shared_ptr<std::byte> device_buffer(size_t bytes);

// On the host, in place for asynchronous copies by every device.
std::shared_ptr<std::byte> pinned_buffer(size_t bytes);

// Between any of host and devices. Host memory that is not pinned may be reused on return.
void copy_async(void* dst, const void* src, size_t bytes, Stream stream);
// n_rows pieces of row_bytes each, dst_pitch and src_pitch bytes apart.
void copy_2d_async(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t row_bytes,
                   size_t n_rows, Stream stream);
void fill_async(void* dst, std::byte value, size_t bytes, Stream stream);

// ---- order --------------------------------------------------------------------------------------

Stream create_stream();
void destroy_stream(Stream stream) noexcept;
void sync_stream(Stream stream);
void sync_device();

class Event {
 public:
  explicit Event(bool timed = true);  // since_ms needs it; orders are cheaper to keep without
  ~Event();
  Event(Event&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  void record(Stream stream);
  void wait_in(Stream stream) const;  // what is enqueued next waits for the recorded point
  void sync() const;
  bool done() const;
  float since_ms(const Event& start) const;  // between the recorded points

 private:
  void* handle_ = nullptr;
};

// ---- recorded graphs ----------------------------------------------------------------------------

class RecordedGraph {
 public:
  RecordedGraph() = default;
  explicit RecordedGraph(void* handle) : handle_(handle) {}
  ~RecordedGraph();
  RecordedGraph(RecordedGraph&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  RecordedGraph& operator=(RecordedGraph&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  explicit operator bool() const { return handle_ != nullptr; }
  void launch(Stream stream) const;

 private:
  void* handle_ = nullptr;
};

// What is enqueued between the two is kept instead of run. abandon_recording ends one that failed.
void begin_recording(Stream stream);
RecordedGraph end_recording(Stream stream);
void abandon_recording(Stream stream) noexcept;

// ---- launches -----------------------------------------------------------------------------------

#ifndef MLA_CUDA_EMULATE
// params: the addresses of the kernel's arguments.
void launch_kernel(const CudaRun& run, const void* kernel, dim3 grid, dim3 block,
                   size_t dynamic_smem_bytes, void** params);

template <class... P>
void launch_kernel(const CudaRun& run, void (*kernel)(P...), dim3 grid, dim3 block,
                   size_t dynamic_smem_bytes, std::tuple<P...> args) {
  std::apply(
      [&](P&... arg) {
        void* params[] = {const_cast<void*>(static_cast<const void*>(&arg))..., nullptr};
        launch_kernel(run, reinterpret_cast<const void*>(kernel), grid, block, dynamic_smem_bytes,
                      params);
      },
      args);
}
#endif

// Enqueues a kernel; an empty grid enqueues nothing. The kernel may start before the ones before it
// have ended: it calls pdl_wait() before it touches what they write.
template <class... P, class... A>
void launch(const CudaRun& run, void (*kernel)(P...), dim3 grid, dim3 block,
            size_t dynamic_smem_bytes, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "a kernel takes no default arguments");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  launch_kernel(run, kernel, grid, block, dynamic_smem_bytes,
                std::tuple<P...>(static_cast<P>(args)...));
}

}  // namespace mla::cuda
