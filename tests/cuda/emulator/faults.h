// Says which kernel and thread touched memory that is not there, before the process dies of it.
#pragma once

#include <csignal>
#include <cstddef>

namespace mla::emulator {

// While it lives, faults of the calling thread are reported as the kernel's. kernel outlives it.
class FaultReport {
 public:
  explicit FaultReport(const char* kernel);
  ~FaultReport();
  FaultReport(const FaultReport&) = delete;
  FaultReport& operator=(const FaultReport&) = delete;

 private:
  struct sigaction segv_ = {}, bus_ = {}, fpe_ = {};
  stack_t stack_ = {};
};

}  // namespace mla::emulator
