// Errors that callers can act on, and the checks that raise them.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace mla {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct ShapeError : Error {
  using Error::Error;
};
struct UnsupportedError : Error {
  using Error::Error;
};
struct FormatError : Error {
  using Error::Error;
};
struct DeviceError : Error {
  using Error::Error;
};
struct MemoryLimitError : Error {
  using Error::Error;
};
struct CancelledError : Error {
  using Error::Error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace mla

#define MLA_CHECK(ErrorType, condition, ...)                              \
  do {                                                                    \
    if (!(condition)) throw ::mla::ErrorType(::mla::concat(__VA_ARGS__)); \
  } while (0)
#define MLA_CHECK_SHAPE(condition, ...) MLA_CHECK(ShapeError, condition, __VA_ARGS__)
