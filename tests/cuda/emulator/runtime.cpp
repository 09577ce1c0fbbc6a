// The twin of backends/cuda/runtime.cpp: device memory is the host's, and all is done at once.
//
// MLA_EMULATOR_CAPABILITY (90) and MLA_EMULATOR_SMS (16) choose the device that is told of.
#include "backends/cuda/runtime.h"

#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "base/error.h"

namespace mla::emulator {
namespace {

using Work = std::vector<std::function<void()>>;

struct EmulatedStream {
  bool recording = false;
  Work recorded;
};

EmulatedStream* stream_of(cuda::Stream stream) { return static_cast<EmulatedStream*>(stream); }

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

constexpr size_t kTotalBytes = size_t{8} << 30;
constexpr size_t kAlignment = 256;
constexpr size_t kPageBytes = 4096;
constexpr int kRubbish = 0xff;

// An allocation ends at a page that cannot be touched.
struct Allocation {
  void* pages;
  size_t page_bytes;
  size_t bytes;
};

struct Allocations {
  std::mutex mutex;
  std::map<std::byte*, Allocation> all;
  size_t total_bytes = 0;
};

Allocations& allocations() {
  static Allocations the_allocations;
  return the_allocations;
}

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

using Clock = std::chrono::steady_clock;

}  // namespace

void enqueue(cuda::Stream stream, std::function<void()> work) {
  if (stream != nullptr && stream_of(stream)->recording) {
    stream_of(stream)->recorded.push_back(std::move(work));
  } else {
    work();
  }
}

}  // namespace mla::emulator

namespace mla::cuda {

using namespace emulator;

// ---- devices ------------------------------------------------------------------------------------

int device_count() { return 1; }
std::string device_problem() { return ""; }
int driver_version() { return runtime_version(); }
int runtime_version() { return 13000; }

DeviceInfo device_info(int index) {
  MLA_CHECK(DeviceError, index == 0, "CUDA device ", index, " does not exist: there are 1");
  DeviceInfo info;
  info.name = "emulated";
  const int capability = setting("MLA_EMULATOR_CAPABILITY", 90);
  info.major = capability / 10;
  info.minor = capability % 10;
  info.n_sm = setting("MLA_EMULATOR_SMS", 16);
  info.l2_bytes = size_t{50} << 20;
  info.smem_per_block = size_t{capability >= 90 ? 227u : capability >= 80 ? 99u : 64u} << 10;
  info.total_bytes = kTotalBytes;
  return info;
}

void use_device(int index) {
  MLA_CHECK(DeviceError, index == 0, "CUDA device ", index, " does not exist: there are 1");
}

bool enable_peer(int, int) { return false; }

DeviceMemory device_memory() {
  Allocations& a = allocations();
  const std::lock_guard lock(a.mutex);
  return {kTotalBytes - a.total_bytes, kTotalBytes};
}

// ---- memory -------------------------------------------------------------------------------------

std::byte* alloc_device(size_t bytes) {
  Allocations& a = allocations();
  const std::lock_guard lock(a.mutex);
  MLA_CHECK(MemoryLimitError, bytes <= kTotalBytes - a.total_bytes,
            "CUDA: out of device memory: ", bytes, " bytes asked for, ",
            kTotalBytes - a.total_bytes, " of ", kTotalBytes, " free");
  const size_t used = round_up(bytes == 0 ? 1 : bytes, kAlignment);
  const size_t inside = round_up(used, kPageBytes);
  void* pages = mmap(nullptr, inside + kPageBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  MLA_CHECK(MemoryLimitError, pages != MAP_FAILED, "emulator: the host is out of memory");
  (void)mprotect(static_cast<std::byte*>(pages) + inside, kPageBytes, PROT_NONE);
  std::byte* data = static_cast<std::byte*>(pages) + (inside - used);
  std::memset(data, kRubbish, used);
  a.all[data] = {pages, inside + kPageBytes, bytes};
  a.total_bytes += bytes;
  return data;
}

void free_device(std::byte* data) noexcept {
  Allocations& a = allocations();
  const std::lock_guard lock(a.mutex);
  const auto it = a.all.find(data);
  if (it == a.all.end()) return;
  (void)munmap(it->second.pages, it->second.page_bytes);
  a.total_bytes -= it->second.bytes;
  a.all.erase(it);
}

std::shared_ptr<std::byte> device_buffer(size_t bytes) {
  return {alloc_device(bytes), [](std::byte* data) { free_device(data); }};
}

std::shared_ptr<std::byte> pinned_buffer(size_t bytes) {
  return {new std::byte[bytes == 0 ? 1 : bytes], [](std::byte* data) { delete[] data; }};
}

void copy_async(void* dst, const void* src, size_t bytes, Stream stream) {
  enqueue(stream, [=] { std::memmove(dst, src, bytes); });
}

void copy_2d_async(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t row_bytes,
                   size_t n_rows, Stream stream) {
  enqueue(stream, [=] {
    for (size_t i = 0; i < n_rows; ++i) {
      std::memmove(static_cast<std::byte*>(dst) + i * dst_pitch,
                   static_cast<const std::byte*>(src) + i * src_pitch, row_bytes);
    }
  });
}

void fill_async(void* dst, std::byte value, size_t bytes, Stream stream) {
  enqueue(stream, [=] { std::memset(dst, static_cast<int>(value), bytes); });
}

// ---- order --------------------------------------------------------------------------------------

Stream create_stream() { return new EmulatedStream; }
void destroy_stream(Stream stream) noexcept { delete stream_of(stream); }
void sync_stream(Stream stream) {
  MLA_CHECK(DeviceError, stream == nullptr || !stream_of(stream)->recording,
            "CUDA: waiting for a stream: operation not permitted when stream is capturing");
}
void sync_device() {}

Event::Event() : handle_(new Clock::time_point(Clock::now())) {}
Event::~Event() { delete static_cast<Clock::time_point*>(handle_); }
void Event::record(Stream) { *static_cast<Clock::time_point*>(handle_) = Clock::now(); }
void Event::wait_in(Stream) const {}
void Event::sync() const {}
bool Event::done() const { return true; }
float Event::since_ms(const Event& start) const {
  const auto elapsed = *static_cast<Clock::time_point*>(handle_) -
                       *static_cast<const Clock::time_point*>(start.handle_);
  return std::chrono::duration<float, std::milli>(elapsed).count();
}

// ---- recorded graphs ----------------------------------------------------------------------------

RecordedGraph::~RecordedGraph() { delete static_cast<Work*>(handle_); }

void RecordedGraph::launch(Stream) const {
  for (const auto& work : *static_cast<const Work*>(handle_)) work();
}

void begin_recording(Stream stream) {
  MLA_CHECK(DeviceError, stream != nullptr && !stream_of(stream)->recording,
            "CUDA: recording a graph: this stream cannot be recorded, or already is");
  stream_of(stream)->recording = true;
}

RecordedGraph end_recording(Stream stream) {
  MLA_CHECK(DeviceError, stream != nullptr && stream_of(stream)->recording,
            "CUDA: recording a graph: none was begun");
  stream_of(stream)->recording = false;
  return RecordedGraph(new Work(std::exchange(stream_of(stream)->recorded, {})));
}

void abandon_recording(Stream stream) noexcept {
  stream_of(stream)->recording = false;
  stream_of(stream)->recorded.clear();
}

}  // namespace mla::cuda
