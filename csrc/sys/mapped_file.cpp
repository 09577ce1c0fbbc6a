#include "sys/mapped_file.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>

#include "base/error.h"

namespace mla::sys {

// A handler can take no lock, so regions form a list that only grows: 40 bytes per mapping ever
// made, in exchange for never freeing what a handler may be reading. begin and end do not change
// once the region is in the list.
struct MappedRegion {
  uintptr_t begin;
  uintptr_t end;
  std::atomic<bool> live;
  std::atomic<bool> broken;
  MappedRegion* next;
};

namespace {

// Signal dispositions belong to the process, and so does what their handler needs.
std::atomic<MappedRegion*> g_regions = nullptr;
std::atomic<const struct sigaction*> g_previous = nullptr;
std::atomic<bool> g_forwarding = false;
std::atomic<uintptr_t> g_page_bytes = 0;

MappedRegion* find_region(uintptr_t address) {
  for (MappedRegion* r = g_regions.load(std::memory_order_acquire); r != nullptr; r = r->next) {
    if (address >= r->begin && address < r->end && r->live.load(std::memory_order_acquire)) {
      return r;
    }
  }
  return nullptr;
}

// Zero pages from the lost one to the end of the mapping: where a file was cut, all behind the cut
// is gone, and one mapping per page would meet the kernel's limit on their number.
bool replace_lost_pages(MappedRegion* region, uintptr_t address) {
  const uintptr_t page = address & ~(g_page_bytes.load(std::memory_order_relaxed) - 1);
  void* const at = reinterpret_cast<void*>(page);
  const void* mapped = mmap(at, region->end - page, PROT_READ,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return false;
  region->broken.store(true, std::memory_order_release);
  return true;
}

void end_by_default(int signal_number) {
  struct sigaction act = {};
  act.sa_handler = SIG_DFL;
  sigaction(signal_number, &act, nullptr);
  raise(signal_number);  // blocked until the handler returns
}

void forward(int signal_number, siginfo_t* info, void* context) {
  const struct sigaction* previous = g_previous.load(std::memory_order_acquire);
  // Two handlers may each take the other for the previous one; the second time round ends it.
  const bool looped = g_forwarding.exchange(true);
  if (looped || previous == nullptr) {
    end_by_default(signal_number);
  } else if ((previous->sa_flags & SA_SIGINFO) != 0) {
    previous->sa_sigaction(signal_number, info, context);
  } else if (previous->sa_handler == SIG_DFL || previous->sa_handler == SIG_IGN) {
    end_by_default(signal_number);
  } else {
    previous->sa_handler(signal_number);
  }
  g_forwarding.store(false);
}

void on_sigbus(int signal_number, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  // Positive codes come from the kernel for a real fault; BUS_ADRERR is the one of lost pages.
  MappedRegion* region = info->si_code == BUS_ADRERR ? find_region(address) : nullptr;
  if (region == nullptr || !replace_lost_pages(region, address)) {
    forward(signal_number, info, context);
  }
  errno = saved_errno;
}

// Puts our handler first. Others (a debugging aid, say) may have come since; they become previous.
void install_handler() {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  struct sigaction current;
  if (sigaction(SIGBUS, nullptr, &current) != 0) {
    throw DeviceError(concat("SIGBUS handler: ", os_error(errno)));
  }
  if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == on_sigbus) return;
  g_page_bytes.store(static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), std::memory_order_relaxed);
  // Not freed: a handler running in another thread may still read the one before.
  g_previous.store(new struct sigaction(current), std::memory_order_release);
  struct sigaction ours = {};
  ours.sa_sigaction = on_sigbus;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  if (sigaction(SIGBUS, &ours, nullptr) != 0) {
    throw DeviceError(concat("SIGBUS handler: ", os_error(errno)));
  }
}

MappedRegion* add_region(const std::byte* data, int64_t size_bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t page_bytes = g_page_bytes.load(std::memory_order_relaxed);
  const uintptr_t whole_pages =
      (static_cast<uintptr_t>(size_bytes) + page_bytes - 1) / page_bytes * page_bytes;
  auto* region = new MappedRegion{begin, begin + whole_pages, true, false, g_regions.load()};
  while (!g_regions.compare_exchange_weak(region->next, region, std::memory_order_release)) {
  }
  return region;
}

std::string memlock_limit() {
  rlimit limit;
  if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) {
    return "unlimited";
  }
  return concat(limit.rlim_cur, " bytes");
}

}  // namespace

MappedFile::MappedFile(const std::string& path, bool lock)
    : path_(path), file_(path), size_bytes_(file_.size_bytes()) {
  if (size_bytes_ == 0) return;  // mmap refuses empty mappings
  install_handler();
  const auto n_bytes = static_cast<size_t>(size_bytes_);
  void* memory = mmap(nullptr, n_bytes, PROT_READ, MAP_SHARED, file_.fd(), 0);
  MLA_CHECK(DeviceError, memory != MAP_FAILED, path, ": cannot be mapped: ", os_error(errno));
  data_ = static_cast<std::byte*>(memory);
  // A hint, which file systems with huge pages in the page cache take; others ignore it.
  madvise(memory, n_bytes, MADV_HUGEPAGE);
  region_ = add_region(data_, size_bytes_);
  if (lock && mlock(data_, n_bytes) != 0) {
    const std::string reason = os_error(errno);
    region_->live.store(false, std::memory_order_release);
    munmap(data_, n_bytes);
    throw DeviceError(concat(path, ": ", size_bytes_, " bytes cannot be locked in memory: ", reason,
                             "; the limit (ulimit -l) is ", memlock_limit()));
  }
}

MappedFile::~MappedFile() {
  if (data_ == nullptr) return;
  region_->live.store(false, std::memory_order_release);
  munmap(data_, static_cast<size_t>(size_bytes_));
}

void MappedFile::check() const {
  // The last page is padded with zeros and raises no signal where the file lost only a part of it;
  // the size tells.
  const bool broken = region_ != nullptr && region_->broken.load(std::memory_order_acquire);
  MLA_CHECK(DeviceError, !broken && file_.size_bytes() >= size_bytes_, path_,
            ": the file shrank or cannot be read any more while it was in use");
}

void MappedFile::prefetch(int64_t offset, int64_t n_bytes) const {
  MLA_CHECK_SHAPE(offset >= 0 && n_bytes >= 0 && offset <= size_bytes_ - n_bytes, path_, ": bytes ",
                  offset, " to ", offset + n_bytes, " are outside of its ", size_bytes_);
  if (n_bytes == 0) return;
  const auto page_bytes = static_cast<int64_t>(g_page_bytes.load(std::memory_order_relaxed));
  const int64_t begin = offset / page_bytes * page_bytes;
  const auto length = static_cast<size_t>(offset + n_bytes - begin);
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif
  // An older kernel or a page that cannot be read leaves it to the first touch.
  if (madvise(data_ + begin, length, MADV_POPULATE_READ) != 0) {
    madvise(data_ + begin, length, MADV_WILLNEED);
  }
}

}  // namespace mla::sys
