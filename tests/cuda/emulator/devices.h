// The emulated devices: what they say of themselves, which one is in use, and whether it still is.
//
// Environment variables, read when they matter, choose them:
//   MLA_EMULATOR_DEVICES (1), MLA_EMULATOR_CAPABILITY (90), MLA_EMULATOR_SMS (16),
//   MLA_EMULATOR_MIB (8192)      memory of each device
//   MLA_EMULATOR_DRIVER          its version; 0: there is none (13000)
//   MLA_EMULATOR_LOST_AFTER      launches after which the next one faults
//   MLA_EMULATOR_NO_CODE         1: the module has no code for the device
//   MLA_EMULATOR_LATE            1: work is done when somebody waits for it, and no sooner
//   MLA_CUDA_TRACE               a file that gets the name of each kernel that is launched
#pragma once

#include <cstddef>
#include <string>

namespace mla::emulator {

int setting(const char* name, int otherwise);

int device_in_use();          // by this thread
void check_device();          // throws DeviceError where devices are lost
size_t device_total_bytes();  // of each device

// Counts a launch. Throws DeviceError where it is the one that goes wrong.
void note_launch(const std::string& kernel);

}  // namespace mla::emulator
