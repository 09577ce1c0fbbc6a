#include "sys/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "base/error.h"

namespace mla::sys {

std::string os_error(int error) { return std::generic_category().message(error); }

File::File(const std::string& path) : path_(path) {
  struct stat info;
  // A named pipe would block in open() until somebody writes to it.
  if (stat(path.c_str(), &info) != 0) {
    throw DeviceError(concat(path, ": cannot be opened: ", os_error(errno)));
  }
  MLA_CHECK(DeviceError, S_ISREG(info.st_mode), path, ": cannot be opened: is no regular file");
  fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd_ < 0) throw DeviceError(concat(path, ": cannot be opened: ", os_error(errno)));
}

File::~File() {
  if (fd_ >= 0) close(fd_);
}

int64_t File::size_bytes() const {
  struct stat info;
  if (fstat(fd_, &info) != 0) {
    throw DeviceError(concat(path_, ": cannot be examined: ", os_error(errno)));
  }
  return info.st_size;
}

}  // namespace mla::sys
