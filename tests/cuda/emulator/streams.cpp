#include "emulator/streams.h"

#include <chrono>
#include <cstring>
#include <exception>
#include <mutex>
#include <set>

#include "backends/cuda/runtime.h"
#include "base/error.h"
#include "emulator/devices.h"
#include "emulator/memory.h"

namespace mla::emulator {
namespace {

using Clock = std::chrono::steady_clock;

EmulatedStream* stream_of(cuda::Stream stream) { return static_cast<EmulatedStream*>(stream); }

struct Streams {
  std::recursive_mutex mutex;  // of all streams: work of one may wait for another
  std::set<EmulatedStream*> all;
};

Streams& streams() {
  static Streams the_streams;
  return the_streams;
}

// An event as last recorded. What waits for it waits for that, be it recorded again or gone.
struct Point {
  EmulatedStream* stream = nullptr;
  uint64_t n = 0;
  Clock::time_point time;
};

void reach(const Point& point) {
  if (point.stream == nullptr) return;
  const std::lock_guard lock(streams().mutex);
  if (streams().all.contains(point.stream)) point.stream->do_until(point.n);
}

Point& point_of(void* handle) { return *static_cast<Point*>(handle); }

// On the stream's device, whichever the thread uses.
class OnDevice {
 public:
  explicit OnDevice(int device) : before_(device_in_use()) { cuda::use_device(device); }
  ~OnDevice() {
    try {
      cuda::use_device(before_);
    } catch (const Error&) {  // lost; it is in use all the same
    }
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

}  // namespace

void EmulatedStream::give(Work work) {
  const std::lock_guard lock(streams().mutex);
  waiting.push_back(std::move(work));
  ++n_given;
  if (setting("MLA_EMULATOR_LATE", 0) == 0) do_until(n_given);
}

void EmulatedStream::do_until(uint64_t n) {
  const OnDevice on(device);
  while (n_done < n && !waiting.empty()) {
    const Work work = std::move(waiting.front());
    waiting.pop_front();
    ++n_done;
    work();
  }
}

void finish_all_streams() noexcept {
  const std::lock_guard lock(streams().mutex);
  for (EmulatedStream* stream : streams().all) {
    try {
      stream->do_until(stream->n_given);
    } catch (const std::exception&) {
      stream->waiting.clear();
    }
  }
}

void enqueue(cuda::Stream stream, Work work) {
  check_device();
  if (stream == nullptr) {
    work();
  } else if (stream_of(stream)->recording) {
    stream_of(stream)->recorded.push_back(std::move(work));
  } else {
    stream_of(stream)->give(std::move(work));
  }
}

namespace {

// A copy, and the caller's memory is his again on return.
void enqueue_copy(cuda::Stream stream, const void* dst, const void* src, Work work) {
  enqueue(stream, std::move(work));
  const bool at_once = !is_in_place(dst) || !is_in_place(src);
  if (at_once && stream != nullptr && !stream_of(stream)->recording) cuda::sync_stream(stream);
}

}  // namespace
}  // namespace mla::emulator

namespace mla::cuda {

using namespace emulator;

void copy_async(void* dst, const void* src, size_t bytes, Stream stream) {
  enqueue_copy(stream, dst, src, [=] { std::memmove(dst, src, bytes); });
}

void copy_2d_async(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t row_bytes,
                   size_t n_rows, Stream stream) {
  enqueue_copy(stream, dst, src, [=] {
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

Stream create_stream() {
  check_device();
  auto* stream = new EmulatedStream;
  stream->device = device_in_use();
  const std::lock_guard lock(streams().mutex);
  streams().all.insert(stream);
  return stream;
}

void destroy_stream(Stream stream) noexcept {
  if (stream == nullptr) return;
  finish_all_streams();
  const std::lock_guard lock(streams().mutex);
  streams().all.erase(stream_of(stream));
  delete stream_of(stream);
}

void sync_stream(Stream stream) {
  check_device();
  if (stream == nullptr) return;
  MLA_CHECK(DeviceError, !stream_of(stream)->recording,
            "CUDA: waiting for a stream: operation not permitted when stream is capturing");
  const std::lock_guard lock(streams().mutex);
  stream_of(stream)->do_until(stream_of(stream)->n_given);
}

void sync_device() {
  check_device();
  finish_all_streams();
  check_device();
}

Event::Event(bool) : handle_(new Point) {}
Event::~Event() { delete static_cast<Point*>(handle_); }

void Event::record(Stream stream) {
  check_device();
  point_of(handle_) = {stream_of(stream), stream == nullptr ? 0 : stream_of(stream)->n_given,
                       Clock::now()};
}

void Event::wait_in(Stream stream) const {
  enqueue(stream, [point = point_of(handle_)] { reach(point); });
}

void Event::sync() const { reach(point_of(handle_)); }

bool Event::done() const {
  const Point& point = point_of(handle_);
  return point.stream == nullptr || point.stream->n_done >= point.n;
}

float Event::since_ms(const Event& start) const {
  const auto elapsed = point_of(handle_).time - point_of(start.handle_).time;
  return std::chrono::duration<float, std::milli>(elapsed).count();
}

// ---- recorded graphs ----------------------------------------------------------------------------

RecordedGraph::~RecordedGraph() {
  if (handle_ != nullptr) finish_all_streams();
  delete static_cast<std::vector<Work>*>(handle_);
}

void RecordedGraph::launch(Stream stream) const {
  enqueue(stream, [work = static_cast<const std::vector<Work>*>(handle_)] {
    for (const Work& each : *work) each();
  });
}

void begin_recording(Stream stream) {
  check_device();
  MLA_CHECK(DeviceError, stream != nullptr && !stream_of(stream)->recording,
            "CUDA: recording a graph: this stream cannot be recorded, or already is");
  stream_of(stream)->recording = true;
}

RecordedGraph end_recording(Stream stream) {
  MLA_CHECK(DeviceError, stream != nullptr && stream_of(stream)->recording,
            "CUDA: recording a graph: none was begun");
  stream_of(stream)->recording = false;
  return RecordedGraph(new std::vector<Work>(std::exchange(stream_of(stream)->recorded, {})));
}

void abandon_recording(Stream stream) noexcept {
  stream_of(stream)->recording = false;
  stream_of(stream)->recorded.clear();
}

}  // namespace mla::cuda
