#include "backends/cuda/runtime.h"

#include <cstdlib>
#include <fstream>

#include "backends/cuda/problems.h"
#include "base/error.h"

namespace mla::cuda {
namespace {

// A block has 48 KB of shared memory without asking, of which its static variables take some.
constexpr size_t kUnaskedSmemBytes = 40 * 1024;
// Where kernels may start before the ones before them have ended. Devices between the two run code
// of an older capability, which does not wait for others.
bool has_dependent_launch(const DeviceInfo& device) {
  return device.major == 9 || device.major == 12;
}

// After these, every further call fails in the same way, for other devices too.
bool loses_devices(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorLaunchFailure:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorMpsClientTerminated:
    case cudaErrorContextIsDestroyed:
#if CUDART_VERSION >= 13000
    case cudaErrorContained:
    case cudaErrorTensorMemoryLeak:
    case cudaErrorExternalDevice:
#endif
      return true;
    default:
      return false;
  }
}

std::string text_of(cudaError_t error) {
  return concat(cudaGetErrorString(error), ", ", cudaGetErrorName(error));
}

int device_in_use() {
  int index = 0;
  (void)cudaGetDevice(&index);
  return index;
}

// Reads the pending error away, so that the next call does not report this one.
void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  const int index = device_in_use();
  if (loses_devices(error)) throw_lost(text_of(error));
  if (error == cudaErrorMemoryAllocation) throw_out_of_memory(index, what);
  if (error == cudaErrorNoKernelImageForDevice) throw_no_code(device_info(index));
  throw DeviceError(concat("cuda:", index, ": ", what, ": ", text_of(error)));
}

// What cannot be reported from where it happens: destructors, and ends of what already failed.
void ignore(cudaError_t error) noexcept {
  if (error != cudaSuccess) (void)cudaGetLastError();
}

cudaEvent_t event(void* handle) { return static_cast<cudaEvent_t>(handle); }

cudaError_t count_devices(int* count) {
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    *count = 0;
  }
  return error;
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "reading the device's attributes");
  return value;
}

}  // namespace

// ---- devices ------------------------------------------------------------------------------------

int device_count() {
  int count = 0;
  (void)count_devices(&count);
  return count;
}

std::string device_problem() {
  int count = 0;
  const cudaError_t error = count_devices(&count);
  if (count > 0) return "";
  const int driver = driver_version();
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  const auto absent = [&](Absence absence) {
    return absence_text(absence, driver, runtime_version(), visible);
  };
  if (driver == 0) return absent(Absence::no_driver);
  if (error == cudaErrorInsufficientDriver) return absent(Absence::old_driver);
  if (error == cudaSuccess || error == cudaErrorNoDevice) return absent(Absence::hidden);
  return concat("CUDA does not start: ", text_of(error));
}

int driver_version() {
  int version = 0;
  ignore(cudaDriverGetVersion(&version));
  return version;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "reading the runtime's version");
  return version;
}

DeviceInfo device_info(int index) {
  const int count = device_count();
  if (index < 0 || index >= count) throw_no_such_device(index, count, device_problem());
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, index), "reading the device's properties");
  DeviceInfo info;
  info.index = index;
  info.name = properties.name;
  info.major = properties.major;
  info.minor = properties.minor;
  info.n_sm = properties.multiProcessorCount;
  info.l2_bytes = static_cast<size_t>(properties.l2CacheSize);
  info.smem_per_block =
      static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  info.total_bytes = properties.totalGlobalMem;
  return info;
}

void use_device(int index) { check(cudaSetDevice(index), "choosing the device"); }

bool enable_peer(int index, int peer) {
  int can = 0;
  check(cudaDeviceCanAccessPeer(&can, index, peer), "asking for access between devices");
  if (can == 0) return false;
  use_device(index);
  const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    ignore(error);
    return true;
  }
  check(error, "enabling access between devices");
  return true;
}

DeviceMemory device_memory() {
  DeviceMemory memory;
  check(cudaMemGetInfo(&memory.free_bytes, &memory.total_bytes), "reading the device's memory");
  return memory;
}

// ---- memory -------------------------------------------------------------------------------------

std::byte* alloc_device(size_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes == 0 ? 1 : bytes);
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    throw_out_of_memory(device_in_use(), bytes, device_memory());
  }
  check(error, "allocating device memory");
  return static_cast<std::byte*>(data);
}

void free_device(std::byte* data) noexcept { ignore(cudaFree(data)); }

std::shared_ptr<std::byte> device_buffer(size_t bytes) {
  return {alloc_device(bytes), [](std::byte* data) { free_device(data); }};
}

std::shared_ptr<std::byte> pinned_buffer(size_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, bytes == 0 ? 1 : bytes, cudaHostAllocPortable);
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    throw_out_of_pinned_memory(bytes);
  }
  check(error, "pinning host memory");
  return {static_cast<std::byte*>(data), [](std::byte* pinned) { ignore(cudaFreeHost(pinned)); }};
}

void copy_async(void* dst, const void* src, size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, stream), "copying");
}

void copy_2d_async(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t row_bytes,
                   size_t n_rows, Stream stream) {
  if (row_bytes == 0 || n_rows == 0) return;
  check(cudaMemcpy2DAsync(dst, dst_pitch, src, src_pitch, row_bytes, n_rows, cudaMemcpyDefault,
                          stream),
        "copying rows");
}

void fill_async(void* dst, std::byte value, size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemsetAsync(dst, static_cast<int>(value), bytes, stream), "filling");
}

// ---- order --------------------------------------------------------------------------------------

Stream create_stream() {
  Stream stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  return stream;
}

void destroy_stream(Stream stream) noexcept { ignore(cudaStreamDestroy(stream)); }
void sync_stream(Stream stream) { check(cudaStreamSynchronize(stream), "waiting for a stream"); }
void sync_device() { check(cudaDeviceSynchronize(), "waiting for the device"); }

Event::Event(bool timed) {
  cudaEvent_t created = nullptr;
  check(cudaEventCreateWithFlags(&created, timed ? cudaEventDefault : cudaEventDisableTiming),
        "creating an event");
  handle_ = created;
}

Event::~Event() {
  if (handle_ != nullptr) ignore(cudaEventDestroy(event(handle_)));
}

void Event::record(Stream stream) {
  check(cudaEventRecord(event(handle_), stream), "recording an event");
}

void Event::wait_in(Stream stream) const {
  check(cudaStreamWaitEvent(stream, event(handle_), 0), "waiting for an event");
}

void Event::sync() const { check(cudaEventSynchronize(event(handle_)), "waiting for an event"); }

bool Event::done() const {
  const cudaError_t error = cudaEventQuery(event(handle_));
  if (error == cudaErrorNotReady) {
    ignore(error);
    return false;
  }
  check(error, "asking for an event");
  return true;
}

float Event::since_ms(const Event& start) const {
  float ms = 0.0f;
  check(cudaEventElapsedTime(&ms, event(start.handle_), event(handle_)), "timing");
  return ms;
}

// ---- recorded graphs ----------------------------------------------------------------------------

RecordedGraph::~RecordedGraph() {
  if (handle_ != nullptr) ignore(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(handle_)));
}

void RecordedGraph::launch(Stream stream) const {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(handle_), stream), "launching a graph");
}

void begin_recording(Stream stream) {
  // Other threads go on as they like: what they call cannot reach this stream.
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording a graph");
}

RecordedGraph end_recording(Stream stream) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream, &graph), "recording a graph");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  ignore(cudaGraphDestroy(graph));
  check(error, "making a recorded graph executable");
  return RecordedGraph(executable);
}

void abandon_recording(Stream stream) noexcept {
  cudaGraph_t graph = nullptr;
  ignore(cudaStreamEndCapture(stream, &graph));
  if (graph != nullptr) ignore(cudaGraphDestroy(graph));
}

// ---- launches -----------------------------------------------------------------------------------

namespace {

// For tests: MLA_CUDA_TRACE names a file that gets the name of each kernel that is launched.
void trace(const void* kernel) {
  static const char* const path = std::getenv("MLA_CUDA_TRACE");
  if (path == nullptr) return;
  const char* name = nullptr;
  check(cudaFuncGetName(&name, kernel), "asking for a kernel's name");
  std::ofstream(path, std::ios::app) << name << std::endl;
}

}  // namespace

void launch_kernel(const CudaRun& run, const void* kernel, dim3 grid, dim3 block,
                   size_t dynamic_smem_bytes, void** params) {
  if (dynamic_smem_bytes > kUnaskedSmemBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(dynamic_smem_bytes)),
          "asking for shared memory");
  }
  trace(kernel);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_smem_bytes;
  config.stream = run.stream;
  config.attrs = &attribute;
  config.numAttrs = has_dependent_launch(run.device) ? 1 : 0;
  check(cudaLaunchKernelExC(&config, kernel, params), "launching a kernel");
}

}  // namespace mla::cuda
