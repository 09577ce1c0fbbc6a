// An open descriptor that closes itself.
#pragma once

#include <cstdint>
#include <string>

namespace mla::sys {

class File {
 public:
  // For reading. Throws DeviceError naming the path where it cannot be opened or is no file.
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }
  int64_t size_bytes() const;  // now; throws DeviceError

 private:
  std::string path_;
  int fd_ = -1;
};

// The text of errno.
std::string os_error(int error);

}  // namespace mla::sys
