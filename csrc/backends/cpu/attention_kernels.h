// The attention kernels' table; kept apart from kernels.h, which every op includes.
#pragma once
#include "backends/cpu/kernels.h"
namespace mla::cpu {
struct AttentionTable {
  int pending;
};
}  // namespace mla::cpu
