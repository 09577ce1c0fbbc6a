#include "sys/parallel_read.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "base/error.h"
#include "sys/affinity.h"
#include "sys/file.h"

namespace mla::sys {
namespace {

// One piece per read: long enough to stream, short enough that the readers end together.
constexpr int64_t kPieceBytes = int64_t{8} << 20;
constexpr int kDefaultReaders = 8;
constexpr auto kProgressInterval = std::chrono::milliseconds(100);
// What direct reads want of offsets, lengths and addresses: no drive has larger blocks.
constexpr int64_t kBlockBytes = 4096;

using Clock = std::chrono::steady_clock;

struct Piece {
  int file;
  int64_t offset;
  int64_t n_bytes;
  std::byte* out;
};

std::vector<Piece> cut(std::span<const FileRuns> runs) {
  std::vector<Piece> pieces;
  for (const FileRuns& r : runs) {
    for (int64_t run = 0; run < r.n_runs; ++run) {
      for (int64_t at = 0; at < r.n_bytes; at += kPieceBytes) {
        pieces.push_back({r.file, r.offset + run * r.file_stride + at,
                          std::min(kPieceBytes, r.n_bytes - at), r.out + run * r.out_stride + at});
      }
    }
  }
  // As the drive would like them.
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
    return a.file != b.file ? a.file < b.file : a.offset < b.offset;
  });
  return pieces;
}

// A file opened the usual way and, where it is to bypass the page cache, directly too.
class Source {
 public:
  Source(const std::string& path, PageCache page_cache)
      : path_(path), file_(path), drop_(page_cache == PageCache::bypass) {
    // A file system that has no direct reads refuses here or at the first one.
    if (drop_) direct_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  }
  ~Source() {
    if (direct_ >= 0) close(direct_);
  }
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;

  const std::string& path() const { return path_; }
  int fd() const { return file_.fd(); }
  int direct() const { return refused_ ? -1 : direct_; }
  void refuse() { refused_ = true; }
  void drop(int64_t offset, int64_t n_bytes) const {
    if (drop_) posix_fadvise(file_.fd(), offset, n_bytes, POSIX_FADV_DONTNEED);
  }

 private:
  std::string path_;
  File file_;
  bool drop_;
  int direct_ = -1;
  std::atomic<bool> refused_ = false;
};

// Blocks for direct reads, on a page boundary and next to the thread that touches them first.
class Staging {
 public:
  std::byte* data() {
    if (data_ == nullptr) {
      void* memory =
          mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory != MAP_FAILED) data_ = static_cast<std::byte*>(memory);
    }
    return data_;
  }
  Staging() = default;
  ~Staging() {
    if (data_ != nullptr) munmap(data_, kBytes);
  }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  static constexpr size_t kBytes = kPieceBytes + 2 * kBlockBytes;

 private:
  std::byte* data_ = nullptr;
};

// Hands pieces to the readers, and keeps the first failure.
class ParallelRead {
 public:
  ParallelRead(std::span<const std::string> paths, std::span<const ReadTeam> teams,
               PageCache page_cache)
      : teams_(teams), states_(teams.size()) {
    for (const std::string& path : paths) {
      sources_.push_back(std::make_unique<Source>(path, page_cache));
    }
    for (size_t i = 0; i < teams.size(); ++i) states_[i].pieces = cut(teams[i].runs);
  }

  std::vector<TeamResult> run(const ReadProgress& progress) {
    std::vector<std::jthread> readers;
    // Whatever leaves this function, the readers are told to stop before they are joined.
    struct Stopper {
      std::atomic<bool>& stop;
      ~Stopper() { stop = true; }
    };
    const Stopper stopper{stop_};
    started_ = Clock::now();
    for (size_t i = 0; i < teams_.size(); ++i) {
      const int wanted = teams_[i].n_threads > 0 ? teams_[i].n_threads : kDefaultReaders;
      const auto n = std::min(static_cast<size_t>(wanted), states_[i].pieces.size());
      for (size_t k = 0; k < n; ++k) {
        {
          const std::lock_guard lock(mutex_);
          ++n_running_;
        }
        try {
          readers.emplace_back([this, i] { read_pieces(i); });
        } catch (const std::system_error& e) {
          throw DeviceError(concat(sources_.front()->path(), ": only ", readers.size(),
                                   " threads could be started to read it: ", e.code().message()));
        }
      }
    }
    report_until_done(progress);
    const std::lock_guard lock(mutex_);
    if (!failure_.empty()) throw DeviceError(failure_);
    std::vector<TeamResult> results;
    for (const State& state : states_) {
      results.push_back({state.done_bytes, state.seconds, state.direct});
    }
    return results;
  }

 private:
  struct State {
    std::vector<Piece> pieces;
    std::atomic<size_t> next = 0;
    std::atomic<int64_t> done_bytes = 0;
    std::atomic<bool> direct = false;
    double seconds = 0;  // by its last reader, under the mutex
  };

  void report_until_done(const ReadProgress& progress) {
    std::vector<int64_t> done(states_.size());
    bool running = true;
    while (running) {
      {
        std::unique_lock lock(mutex_);
        running = !ended_.wait_for(lock, kProgressInterval, [this] { return n_running_ == 0; });
        if (!failure_.empty()) return;
      }
      for (size_t i = 0; i < done.size(); ++i) done[i] = states_[i].done_bytes;
      if (progress) progress(done);
    }
  }

  void read_pieces(size_t team) {
    run_on(teams_[team].cpus);  // where that is refused, only the way of the bytes is longer
    State& state = states_[team];
    Staging staging;
    while (!stop_) {
      const size_t next = state.next.fetch_add(1);
      if (next >= state.pieces.size() || !read_piece(state, state.pieces[next], staging)) break;
    }
    const std::lock_guard lock(mutex_);
    state.seconds = std::chrono::duration<double>(Clock::now() - started_).count();
    --n_running_;
    ended_.notify_all();
  }

  bool read_piece(State& state, const Piece& piece, Staging& staging) {
    Source& source = *sources_[static_cast<size_t>(piece.file)];
    if (source.direct() >= 0 && staging.data() != nullptr) {
      if (read_direct(source, piece, staging.data())) {
        state.direct = true;
        state.done_bytes += piece.n_bytes;
        return true;
      }
      if (stop_) return false;
      source.refuse();  // the usual way says what is wrong, if anything is
    }
    int64_t at = 0;
    while (at < piece.n_bytes && !stop_) {
      const ssize_t got = pread(source.fd(), piece.out + at,
                                static_cast<size_t>(piece.n_bytes - at), piece.offset + at);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return fail(concat(source.path(), ": reading failed: ", os_error(errno)));
      if (got == 0) {
        return fail(concat(source.path(), ": ends at byte ", piece.offset + at, ", expected ",
                           piece.n_bytes - at, " more"));
      }
      at += got;
      state.done_bytes += got;
    }
    source.drop(piece.offset, piece.n_bytes);
    return true;
  }

  // Whole blocks into `staging`, then the piece into place. False where that does not work.
  bool read_direct(const Source& source, const Piece& piece, std::byte* staging) {
    const int64_t begin = piece.offset / kBlockBytes * kBlockBytes;
    const int64_t end = piece.offset + piece.n_bytes;
    const int64_t length = (end - begin + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    int64_t at = 0;
    while (begin + at < end) {
      if (stop_) return false;
      const ssize_t got =
          pread(source.direct(), staging + at, static_cast<size_t>(length - at), begin + at);
      if (got < 0 && errno == EINTR) continue;
      // Off a block boundary is the end of the file, where no direct read can begin.
      if (got <= 0 || (got % kBlockBytes != 0 && begin + at + got < end)) return false;
      at += got;
    }
    std::memcpy(piece.out, staging + (piece.offset - begin), static_cast<size_t>(piece.n_bytes));
    return true;
  }

  bool fail(const std::string& message) {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = message;
    stop_ = true;
    return false;
  }

  std::span<const ReadTeam> teams_;
  std::vector<State> states_;
  std::vector<std::unique_ptr<Source>> sources_;
  Clock::time_point started_;
  std::atomic<bool> stop_ = false;
  std::mutex mutex_;
  std::condition_variable ended_;
  int n_running_ = 0;
  std::string failure_;
};

}  // namespace

std::vector<TeamResult> read_in_parallel(std::span<const std::string> paths,
                                         std::span<const ReadTeam> teams, PageCache page_cache,
                                         const ReadProgress& progress) {
  return ParallelRead(paths, teams, page_cache).run(progress);
}

}  // namespace mla::sys
