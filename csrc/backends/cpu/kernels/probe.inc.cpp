// What this ISA can do at best, to hold kernels against: one read of memory, and multiply-adds that
// touch registers only.
//
//   read        the exclusive or of all words: four loads in flight, nothing written
//   multiply    n_steps times kSums independent sums, sum = sum * a + a in the unit's own numbers
//
// What comes out means nothing; it is returned so that the work cannot be dropped.
#include "backends/cpu/kernels.h"
#include "backends/cpu/simd/simd.h"
#if defined(MLA_ISA_AVX512AMX)
#include "backends/cpu/simd/amx.h"
#endif

namespace mla::cpu::MLA_ISA {
namespace {

// An instruction's 4-5 cycles on two units per cycle need 10 sums; 12 and two operands fit into the
// 16 registers of AVX2.
constexpr int kSums = 12;
constexpr int kStreams = 4;

uint32_t read(const std::byte* data, int64_t n_bytes) noexcept {
  const auto* from = reinterpret_cast<const float*>(data);
  I32 sums[kStreams] = {};
  constexpr int64_t kStep = int64_t{kStreams} * kLanes;
  for (int64_t i = 0; i + kStep <= n_bytes / 4; i += kStep) {
    for (int s = 0; s < kStreams; ++s) sums[s] ^= (I32)load(from + i + s * kLanes);
  }
  return static_cast<uint32_t>((sums[0] ^ sums[1] ^ sums[2] ^ sums[3])[0]);
}

// Each sum takes step(sum) n_steps times.
template <class Sum, class Step>
MLA_INLINE uint32_t run_chains(int64_t n_steps, Sum first, const Step& step) {
  Sum sums[kSums];
  for (int s = 0; s < kSums; ++s) sums[s] = first;
  for (int64_t i = 0; i < n_steps; ++i) {
#pragma GCC unroll 12
    for (int s = 0; s < kSums; ++s) sums[s] = step(sums[s]);
  }
  I32 total = (I32)sums[0];
  for (int s = 1; s < kSums; ++s) total ^= (I32)sums[s];
  return static_cast<uint32_t>(total[0]);
}

uint32_t multiply_f32(int64_t n_steps, uint32_t seed) noexcept {
  const F32 a = set1(0.5f + static_cast<float>(seed));  // seed is 0, which no compiler knows
  return run_chains(n_steps, a, [a](F32 sum) { return sum * a + a; });
}

uint32_t multiply_int8(int64_t n_steps, uint32_t seed) noexcept {
  const Bytes a = (Bytes)(I32{} + static_cast<int32_t>(0x01010101 + seed));
  // The sum is an operand too: products of constants would be computed once. A step adds at most
  // 4 * 127, so a million of them stay within 32 bits.
  return run_chains(n_steps, (I32)a, [a](I32 sum) { return dot_add(sum, a, (Bytes)sum); });
}

#if defined(MLA_ISA_AVX512AMX) && !defined(MLA_AMX_EMULATED)
constexpr int64_t kStepsPerTile = 16;  // a tile's product takes about as many cycles
uint32_t multiply_bf16(int64_t n_steps, uint32_t seed) noexcept {
  Tiles tiles;
  tiles.shape(16, 16);
  tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
  tiles.zero<4>(), tiles.zero<5>(), tiles.zero<6>(), tiles.zero<7>();
  for (int64_t i = 0; i < n_steps; i += kStepsPerTile) {
    tiles.multiply<0, 4, 6>();
    tiles.multiply<1, 4, 7>();
    tiles.multiply<2, 5, 6>();
    tiles.multiply<3, 5, 7>();
  }
  return seed;
}
constexpr int64_t kBf16Ops = int64_t{4} * 16 * 16 * 32 * 2 / kStepsPerTile;
#elif defined(MLA_ISA_AVX512BF16)
constexpr int64_t kBf16Ops = int64_t{4} * kLanes * kSums;
uint32_t multiply_bf16(int64_t n_steps, uint32_t seed) noexcept {
  uint16_t a[2 * kLanes];
  for (uint16_t& x : a) x = static_cast<uint16_t>(0x3f80 + seed);
  return run_chains(n_steps, zero(), [&a](F32 sum) { return dot_bf16(sum, a, a); });
}
#endif

}  // namespace

extern const ProbeTable probe_table;
const ProbeTable probe_table = {
    read,
    {multiply_f32, int64_t{2} * kLanes* kSums},
    {multiply_int8, int64_t{8} * kLanes* kSums},
#if defined(MLA_ISA_AVX512BF16)
    {multiply_bf16, kBf16Ops},
#else
    {nullptr, 0},
#endif
};

}  // namespace mla::cpu::MLA_ISA
