// A total order of floats as integers: what choosing the largest goes by, on every device.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace mla {

// Rises with the value; -0 equals 0. NaN is 1, below -inf (0x007fffff); 0 is left for "none".
// static, not inline: code compiled for one ISA is never linked into another's.
static constexpr uint32_t order_key(float value) {
  if (value != value) return 1;
  const auto bits = std::bit_cast<uint32_t>(value + 0.0f);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// The value of an order_key; 0 for -0.
static constexpr float order_value(uint32_t key) {
  if (key == 1) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}

// Rises with the value and, among equal ones, with a falling id. 0 is left for "none".
static constexpr uint64_t choice_key(float value, uint32_t id) {
  return static_cast<uint64_t>(order_key(value)) << 32 | ~id;
}
static constexpr uint32_t chosen_id(uint64_t key) { return ~static_cast<uint32_t>(key); }

}  // namespace mla
