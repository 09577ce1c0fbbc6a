// A file mapped into memory for reading, which stays safe when the file shrinks.
//
// Touching a mapped page that the file no longer has raises SIGBUS, which ends the process. A
// handler, installed with the first mapping, puts zero pages in place of the lost ones and marks
// the mapping; check() then throws. Computation that ran on the zeros is to be thrown away.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "sys/file.h"

namespace mla::sys {

struct MappedRegion;  // what the signal handler sees of a mapping

class MappedFile {
 public:
  // lock: keep all pages in memory. Throws DeviceError naming the file, and for `lock` the limit.
  explicit MappedFile(const std::string& path, bool lock = false);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const { return data_; }
  int64_t size_bytes() const { return size_bytes_; }
  const std::string& path() const { return path_; }

  // Throws DeviceError if anything read from the mapping may not be what the file held.
  void check() const;
  // Brings these bytes in and maps them; Linux before 5.14 only starts to read them. Throws
  // ShapeError outside the file.
  void prefetch(int64_t offset, int64_t n_bytes) const;

 private:
  std::string path_;
  File file_;
  int64_t size_bytes_;
  std::byte* data_ = nullptr;
  MappedRegion* region_ = nullptr;
};

}  // namespace mla::sys
