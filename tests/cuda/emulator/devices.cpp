#include "emulator/devices.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <fstream>

#include "backends/cuda/problems.h"
#include "backends/cuda/runtime.h"

namespace mla::emulator {
namespace {

constexpr int kMaxDevices = 8;
constexpr const char* kFault = "unspecified launch failure, emulated";

struct State {
  std::atomic<int> n_launches = 0;
  std::atomic<bool> lost = false;
};

State& the_state() {
  static State state;
  return state;
}

thread_local int in_use = 0;

}  // namespace

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

int device_in_use() { return in_use; }

void check_device() {
  if (the_state().lost) cuda::throw_lost(kFault);
}

size_t device_total_bytes() { return static_cast<size_t>(setting("MLA_EMULATOR_MIB", 8192)) << 20; }

void note_launch(const std::string& kernel) {
  check_device();
  if (const char* path = std::getenv("MLA_CUDA_TRACE")) {
    std::ofstream(path, std::ios::app) << kernel << '\n';
  }
  if (setting("MLA_EMULATOR_NO_CODE", 0) != 0) cuda::throw_no_code(cuda::device_info(in_use));
  State& state = the_state();
  if (state.n_launches++ >= setting("MLA_EMULATOR_LOST_AFTER", INT_MAX)) state.lost = true;
  check_device();
}

}  // namespace mla::emulator

namespace mla::cuda {

using namespace emulator;

int device_count() {
  if (driver_version() < runtime_version()) return 0;
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  if (visible != nullptr && *visible == '\0') return 0;
  return std::min(setting("MLA_EMULATOR_DEVICES", 1), kMaxDevices);
}

std::string device_problem() {
  if (device_count() > 0) return "";
  const int driver = driver_version();
  const Absence absence = driver == 0                  ? Absence::no_driver
                          : driver < runtime_version() ? Absence::old_driver
                                                       : Absence::hidden;
  return absence_text(absence, driver, runtime_version(), std::getenv("CUDA_VISIBLE_DEVICES"));
}

int driver_version() { return setting("MLA_EMULATOR_DRIVER", runtime_version()); }
int runtime_version() { return 13000; }

DeviceInfo device_info(int index) {
  const int count = device_count();
  if (index < 0 || index >= count) throw_no_such_device(index, count, device_problem());
  DeviceInfo info;
  info.index = index;
  info.name = "emulated";
  const int capability = setting("MLA_EMULATOR_CAPABILITY", 90);
  info.major = capability / 10;
  info.minor = capability % 10;
  info.n_sm = setting("MLA_EMULATOR_SMS", 16);
  info.l2_bytes = size_t{50} << 20;
  info.smem_per_block = size_t{capability >= 90 ? 227u : capability >= 80 ? 99u : 64u} << 10;
  info.total_bytes = device_total_bytes();
  return info;
}

void use_device(int index) {
  const int count = device_count();
  if (index < 0 || index >= count) throw_no_such_device(index, count, device_problem());
  in_use = index;
  check_device();
}

bool enable_peer(int index, int peer) { return index != peer; }

}  // namespace mla::cuda
