#include "emulator/faults.h"

#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "emulator/block.h"

namespace mla::emulator {
namespace {

// A thread that ran out of its stack cannot report on it.
constexpr size_t kHandlerStackBytes = 64 * 1024;
alignas(16) char handler_stack[kHandlerStackBytes];
const char* kernel_name = "";

void report(int signal, siginfo_t* info, void*) {
  char text[1024];
  const int length = std::snprintf(
      text, sizeof text,
      "\nemulator: %.600s, block (%u, %u, %u), thread (%u, %u, %u): signal %d at address %p\n",
      kernel_name, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z,
      signal, info->si_addr);
  if (length > 0) (void)!write(STDERR_FILENO, text, static_cast<size_t>(length));
  // The instruction is run again, and the fault is now the process's.
  std::signal(signal, SIG_DFL);
}

}  // namespace

FaultReport::FaultReport(const char* kernel) {
  kernel_name = kernel;
  stack_t stack = {};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, &stack_);
  struct sigaction action = {};
  action.sa_sigaction = report;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &segv_);
  sigaction(SIGBUS, &action, &bus_);
  sigaction(SIGFPE, &action, &fpe_);
}

FaultReport::~FaultReport() {
  sigaction(SIGSEGV, &segv_, nullptr);
  sigaction(SIGBUS, &bus_, nullptr);
  sigaction(SIGFPE, &fpe_, nullptr);
  sigaltstack(&stack_, nullptr);
}

}  // namespace mla::emulator
