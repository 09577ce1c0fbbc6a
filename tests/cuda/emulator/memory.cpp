// The twin of memory in backends/cuda/runtime.cpp. An allocation ends at a page that cannot be
// touched, and begins as rubbish.
#include "emulator/memory.h"

#include <sys/mman.h>

#include <array>
#include <cstring>
#include <map>
#include <mutex>

#include "backends/cuda/problems.h"
#include "backends/cuda/runtime.h"
#include "base/error.h"
#include "emulator/devices.h"
#include "emulator/streams.h"

namespace mla::emulator {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kPageBytes = 4096;
constexpr int kRubbish = 0xff;
constexpr int kPinned = -1;

struct Allocation {
  void* pages;
  size_t page_bytes;
  size_t bytes;
  int device;
};

struct Allocations {
  std::mutex mutex;
  std::map<std::byte*, Allocation> all;
  std::map<int, size_t> used_bytes;  // by device
};

Allocations& allocations() {
  static Allocations the_allocations;
  return the_allocations;
}

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Under the lock of `a`.
std::byte* allocate(Allocations& a, size_t bytes, int device) {
  const size_t used = round_up(bytes == 0 ? 1 : bytes, kAlignment);
  const size_t inside = round_up(used, kPageBytes);
  void* pages = mmap(nullptr, inside + kPageBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  MLA_CHECK(MemoryLimitError, pages != MAP_FAILED, "emulator: the host is out of memory");
  (void)mprotect(static_cast<std::byte*>(pages) + inside, kPageBytes, PROT_NONE);
  std::byte* data = static_cast<std::byte*>(pages) + (inside - used);
  if (device != kPinned) std::memset(data, kRubbish, used);
  a.all[data] = {pages, inside + kPageBytes, bytes, device};
  a.used_bytes[device] += bytes;
  return data;
}

void release(std::byte* data) noexcept {
  finish_all_streams();  // as freeing does on a device
  Allocations& a = allocations();
  const std::lock_guard lock(a.mutex);
  const auto it = a.all.find(data);
  if (it == a.all.end()) return;
  (void)munmap(it->second.pages, it->second.page_bytes);
  a.used_bytes[it->second.device] -= it->second.bytes;
  a.all.erase(it);
}

}  // namespace

bool is_in_place(const void* data) {
  Allocations& a = allocations();
  const std::lock_guard lock(a.mutex);
  auto* start = static_cast<std::byte*>(const_cast<void*>(data));
  auto it = a.all.upper_bound(start);
  if (it == a.all.begin()) return false;
  --it;
  return start < it->first + round_up(it->second.bytes, kAlignment);
}

}  // namespace mla::emulator

namespace mla::cuda {

using namespace emulator;

DeviceMemory device_memory() {
  check_device();
  Allocations& a = allocations();
  const std::lock_guard lock(a.mutex);
  const size_t total = device_total_bytes();
  const size_t used = a.used_bytes[device_in_use()];
  return {total > used ? total - used : 0, total};
}

std::byte* alloc_device(size_t bytes) {
  const DeviceMemory memory = device_memory();
  if (bytes > memory.free_bytes) throw_out_of_memory(device_in_use(), bytes, memory);
  Allocations& a = allocations();
  const std::lock_guard lock(a.mutex);
  return allocate(a, bytes, device_in_use());
}

void free_device(std::byte* data) noexcept { release(data); }

std::shared_ptr<std::byte> device_buffer(size_t bytes) {
  return {alloc_device(bytes), [](std::byte* data) { free_device(data); }};
}

std::shared_ptr<std::byte> pinned_buffer(size_t bytes) {
  check_device();
  Allocations& a = allocations();
  const std::lock_guard lock(a.mutex);
  return {allocate(a, bytes, kPinned), [](std::byte* data) { release(data); }};
}

}  // namespace mla::cuda
