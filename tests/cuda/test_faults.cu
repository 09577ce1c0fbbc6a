// What goes wrong on a device, and that the process goes on. Each case is a process of its own,
// because some never get their device back. Exit status 0: all good.
#include <sys/wait.h>
#include <unistd.h>

#include "backends/cuda/problems.h"
#include "intrinsics_cases.h"

namespace mla::cuda::test {
namespace {

__global__ void go_wrong(int* out) {
  pdl_wait();
#ifndef MLA_CUDA_EMULATE
  asm volatile("trap;");
#endif
  *out = 1;
}

// ---- a device is lost ---------------------------------------------------------------------------

constexpr const char* kLost = "CUDA devices are lost to this process";

void lose_device(Test& t, const OnDevice<int>& out) {
#ifdef MLA_CUDA_EMULATE
  setenv("MLA_EMULATOR_LOST_AFTER", "0", 1);
#endif
  t.expect_error<DeviceError>("a kernel that goes wrong", kLost, [&] {
    launch(t.run(), go_wrong, 1, 1, 0, out.get());
    sync_stream(t.stream());
  });
}

// What was made before goes quietly at the end.
void lost(Test& t) {
  const OnDevice<int> out(t, {0});
  const std::shared_ptr<std::byte> pinned = pinned_buffer(64);
  Event event;
  event.record(t.stream());
  lose_device(t, out);
  const auto fails = [&](const char* name, auto f) { t.expect_error<DeviceError>(name, kLost, f); };
  fails("launching after it", [&] { launch(t.run(), go_wrong, 1, 1, 0, out.get()); });
  fails("waiting after it", [&] { sync_stream(t.stream()); });
  fails("copying after it", [&] { copy_async(pinned.get(), out.get(), 4, t.stream()); });
  fails("allocating after it", [&] { (void)alloc_device(64); });
  fails("asking for memory after it", [&] { (void)device_memory(); });
  t.report("devices are counted after it", device_count() > 0, "none");
}

// ---- memory -------------------------------------------------------------------------------------

void no_memory(Test& t) {
  const DeviceMemory before = device_memory();
  t.expect_error<MemoryLimitError>(
      "more memory than there is",
      concat("cuda:0 is out of memory: ", before.total_bytes * 2, " bytes asked for, "),
      [&] { (void)alloc_device(before.total_bytes * 2); });
  const OnDevice<int> out(t, {5});
  t.compare("memory after it", out.host(), {5});
}

// ---- no device to begin with --------------------------------------------------------------------

void report_absent(const char* name, const char* text) {
  const std::string problem = device_problem();
  const bool good = device_count() == 0 && problem.find(text) != std::string::npos;
  std::printf("%s  %s: %s\n", good ? "ok  " : "FAIL", name, problem.c_str());
  if (!good) _exit(1);
}

int hidden() {
  setenv("CUDA_VISIBLE_DEVICES", "", 1);
  report_absent("devices hidden", "CUDA_VISIBLE_DEVICES is ''");
  return 0;
}

#ifdef MLA_CUDA_EMULATE

int no_driver() {
  setenv("MLA_EMULATOR_DRIVER", "0", 1);
  report_absent("no driver", "no NVIDIA driver");
  return 0;
}

int old_driver() {
  setenv("MLA_EMULATOR_DRIVER", "12040", 1);
  report_absent("an old driver", "serves CUDA 12.4, and this build needs 13.0: update the driver");
  return 0;
}

void no_code(Test& t) {
  setenv("MLA_EMULATOR_NO_CODE", "1", 1);
  const OnDevice<int> out(t, {0});
  t.expect_error<DeviceError>("no code for the device", "MLA_CUDA_ARCHS=90a-real",
                              [&] { launch(t.run(), go_wrong, 1, 1, 0, out.get()); });
}

#endif

void too_old(Test& t) {
  DeviceInfo info;
  info.name = "Tesla V100";
  info.major = 7;
  t.expect_error<DeviceError>("a device too old",
                              "compute capability 7.0, accepted is 7.5 or later",
                              [&] { check_capability(info); });
  info.minor = 5;
  check_capability(info);
}

int in(void (*run)(Test&)) {
  Test t;
  run(t);
  return t.n_failed() == 0 ? 0 : 1;
}

struct Case {
  const char* name;
  int (*run)();
};
constexpr Case kCases[] = {
    {"lost", [] { return in(lost); }},
    {"no_memory", [] { return in(no_memory); }},
    {"too_old", [] { return in(too_old); }},
    {"hidden", hidden},
#ifdef MLA_CUDA_EMULATE
    {"no_driver", no_driver},
    {"old_driver", old_driver},
    {"no_code", [] { return in(no_code); }},
#endif
};

bool passes(const Case& one) {
  const pid_t child = fork();
  if (child == 0) {
    execl("/proc/self/exe", "test_faults", one.name, nullptr);
    _exit(127);
  }
  int status = 0;
  (void)waitpid(child, &status, 0);
  const bool good = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  std::printf("%s  case %s\n", good ? "ok  " : "FAIL", one.name);
  return good;
}

}  // namespace
}  // namespace mla::cuda::test

int main(int n_args, char** args) {
  using namespace mla::cuda::test;
  bool good = true;
  for (const Case& one : kCases) {
    if (n_args > 1 && std::string(args[1]) == one.name) return one.run();
    if (n_args == 1) good = passes(one) && good;
  }
  return good && n_args == 1 ? 0 : 1;
}
