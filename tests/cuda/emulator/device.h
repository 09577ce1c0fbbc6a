// CUDA's words for a host compiler: keywords, warp functions, barriers, atomics. Behaviour that the
// language leaves open is an error here, or gives rubbish, rather than what one chip happens to do.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cstdint>
#include <cstring>

#include "emulator/arithmetic.h"
#include "emulator/block.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
// Of the thread of the host that runs the block, hence of the block.
#define __shared__ static thread_local
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define __builtin_assume(condition) static_cast<void>(0)

namespace mla::emulator {

template <class T>
struct ShuffleOperand {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  T value;
  int source;  // lane
  T result;
};

template <class T>
void resolve_shuffle(void* const* operands, uint32_t lanes) {
  for (int lane = 0; lane < warpSize; ++lane) {
    if ((lanes >> lane & 1u) == 0) continue;
    auto* mine = static_cast<ShuffleOperand<T>*>(operands[lane]);
    const auto* other = static_cast<const ShuffleOperand<T>*>(operands[mine->source]);
    if (other != nullptr) {
      mine->result = other->value;
    } else {
      std::memset(static_cast<void*>(&mine->result), 0xff, sizeof(T));
    }
  }
}

inline int own_lane() {
  const unsigned at =
      threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * static_cast<unsigned>(threadIdx.z));
  return static_cast<int>(at % 32);
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* name) {
  ShuffleOperand<T> operand{value, source, value};
  collective(mask, &operand, resolve_shuffle<T>, name);
  return operand.result;
}

// One value from each lane, one result for all.
template <class T, class Combine>
T reduce(unsigned mask, T value, Combine, const char* name) {
  struct Operand {
    T value;
    T result;
  } operand{value, value};
  collective(
      mask, &operand,
      [](void* const* operands, uint32_t lanes) {
        bool first = true;
        T total{};
        for (int lane = 0; lane < warpSize; ++lane) {
          if ((lanes >> lane & 1u) == 0) continue;
          const T one = static_cast<const Operand*>(operands[lane])->value;
          total = first ? one : Combine{}(total, one);
          first = false;
        }
        for (int lane = 0; lane < warpSize; ++lane) {
          if ((lanes >> lane & 1u) != 0) static_cast<Operand*>(operands[lane])->result = total;
        }
      },
      name);
  return operand.result;
}

struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// What the block's threads gave, combined.
int block_reduce(int value, int (*combine)(int, int));

}  // namespace mla::emulator

// ---- warp functions -----------------------------------------------------------------------------

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = mla::emulator::own_lane();
  const int at = (lane & ~(width - 1)) + (source & (width - 1));
  return mla::emulator::shuffle(mask, value, at, "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = mla::emulator::own_lane();
  const int at = lane ^ bits;
  const bool inside = at < (lane & ~(width - 1)) + width;
  return mla::emulator::shuffle(mask, value, inside ? at : lane, "__shfl_xor_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = mla::emulator::own_lane();
  const int at = lane - static_cast<int>(delta);
  const bool inside = at >= (lane & ~(width - 1));
  return mla::emulator::shuffle(mask, value, inside ? at : lane, "__shfl_up_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = mla::emulator::own_lane();
  const int at = lane + static_cast<int>(delta);
  const bool inside = at < (lane & ~(width - 1)) + width;
  return mla::emulator::shuffle(mask, value, inside ? at : lane, "__shfl_down_sync");
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  mla::emulator::collective(
      mask, nullptr, [](void* const*, uint32_t) {}, "__syncwarp");
}
inline unsigned __activemask() { return mla::emulator::alive_lanes(); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned mine = predicate != 0 ? 1u << mla::emulator::own_lane() : 0u;
  return mla::emulator::reduce(mask, mine, mla::emulator::Or{}, "__ballot_sync");
}
inline int __any_sync(unsigned mask, int predicate) {
  return mla::emulator::reduce(mask, predicate != 0 ? 1 : 0, mla::emulator::Or{}, "__any_sync");
}
inline int __all_sync(unsigned mask, int predicate) {
  return mla::emulator::reduce(mask, predicate != 0 ? 1 : 0, mla::emulator::And{}, "__all_sync");
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  unsigned same = 0;
  for (int lane = 0; lane < warpSize; ++lane) {
    const T other = mla::emulator::shuffle(mask, value, lane, "__match_any_sync");
    const bool there = (mask & mla::emulator::alive_lanes()) >> lane & 1u;
    if (there && std::memcmp(&other, &value, sizeof(T)) == 0) same |= 1u << lane;
  }
  return same;
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* predicate) {
  const unsigned lanes = mask & mla::emulator::alive_lanes();
  const unsigned same = __match_any_sync(mask, value);
  *predicate = same == lanes ? 1 : 0;
  return same == lanes ? mask : 0;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return mla::emulator::reduce(mask, value, mla::emulator::Add{}, "__reduce_add_sync");
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return mla::emulator::reduce(mask, value, mla::emulator::Min{}, "__reduce_min_sync");
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return mla::emulator::reduce(mask, value, mla::emulator::Max{}, "__reduce_max_sync");
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return mla::emulator::reduce(mask, value, mla::emulator::And{}, "__reduce_and_sync");
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return mla::emulator::reduce(mask, value, mla::emulator::Or{}, "__reduce_or_sync");
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return mla::emulator::reduce(mask, value, mla::emulator::Xor{}, "__reduce_xor_sync");
}

// ---- block functions ----------------------------------------------------------------------------

inline void __syncthreads() { mla::emulator::barrier(0, 0, true); }
inline int __syncthreads_or(int predicate) {
  return mla::emulator::block_reduce(predicate != 0 ? 1 : 0, [](int a, int b) { return a | b; });
}
inline int __syncthreads_and(int predicate) {
  return mla::emulator::block_reduce(predicate != 0 ? 1 : 0, [](int a, int b) { return a & b; });
}
inline int __syncthreads_count(int predicate) {
  return mla::emulator::block_reduce(predicate != 0 ? 1 : 0, [](int a, int b) { return a + b; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { mla::emulator::yield(); }

// ---- atomics: one thread runs at a time ---------------------------------------------------------

template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <class T>
T atomicSub(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = old - value;
  return old;
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  if (old < value) *at = value;
  return old;
}
template <class T>
T atomicMin(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  if (value < old) *at = value;
  return old;
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = value;
  return old;
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T old = *at;
  if (old == expected) *at = value;
  return old;
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = old | value;
  return old;
}
template <class T>
T atomicAnd(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = old & value;
  return old;
}
inline unsigned atomicInc(unsigned* at, unsigned limit) {
  const unsigned old = *at;
  *at = old >= limit ? 0 : old + 1;
  return old;
}
inline unsigned atomicDec(unsigned* at, unsigned limit) {
  const unsigned old = *at;
  *at = old == 0 || old > limit ? limit : old - 1;
  return old;
}
