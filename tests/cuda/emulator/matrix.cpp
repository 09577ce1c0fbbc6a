#include "emulator/matrix.h"

#include <bit>
#include <cstring>

#include "emulator/block.h"

namespace mla::emulator {
namespace {

constexpr int kM = 16, kN = 8, kK = 16;
constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct MmaOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

float half_to_float(uint32_t bits) {
  // The exponents' biases are 112 apart; a product with 2^112 makes denormals right as well.
  constexpr float kRebias = 0x1p112f;
  uint32_t shifted =
      std::bit_cast<uint32_t>(std::bit_cast<float>((bits & 0x7fffu) << 13) * kRebias);
  if ((bits & 0x7c00u) == 0x7c00u) shifted |= 0x7f800000u;
  return std::bit_cast<float>(shifted | (bits & 0x8000u) << 16);
}

float bf16_to_float(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

template <float (*to_float)(uint32_t)>
void multiply(void* const* operands, uint32_t) {
  float a[kM][kK], b[kK][kN], d[kM][kN] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<const MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const int shift = 16 * half;
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = to_float(own.a[i] >> shift & 0xffffu);
      }
      for (int i = 0; i < 2; ++i) {
        b[2 * t + 8 * i + half][g] = to_float(own.b[i] >> shift & 0xffffu);
      }
    }
  }
  for (int m = 0; m < kM; ++m) {
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < kN; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<const MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) own.d[i] += d[g + i / 2 * 8][2 * t + i % 2];
  }
}

struct LoadOperand {
  uint32_t* r;
  const std::byte* row;
};

template <int Count, bool Transposed>
void load(void* const* operands, uint32_t) {
  for (int i = 0; i < Count; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      const auto& owner = *static_cast<const LoadOperand*>(operands[8 * i + row]);
      std::memcpy(matrix[row], owner.row, sizeof matrix[row]);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint32_t low = Transposed ? matrix[t][g] : matrix[g][t];
      const uint32_t high = Transposed ? matrix[t + 1][g] : matrix[g][t + 1];
      static_cast<const LoadOperand*>(operands[lane])->r[i] = low | high << 16;
    }
  }
}

void whole_warp(const char* name) {
  if (alive_lanes() != kAllLanes) fail(std::string(name) + ": some lanes of the warp have ended");
}

}  // namespace

void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16) {
  const char* name = is_bf16 ? "mma_bf16" : "mma_f16";
  whole_warp(name);
  MmaOperand operand{d, a, b};
  collective(kAllLanes, &operand, is_bf16 ? multiply<bf16_to_float> : multiply<half_to_float>,
             name);
}

void load_matrices(uint32_t* r, const void* row, int count, bool transposed) {
  whole_warp("ldmatrix");
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix: an unaligned row");
  LoadOperand operand{r, static_cast<const std::byte*>(row)};
  Resolve resolve = nullptr;
  if (count == 4) resolve = transposed ? load<4, true> : load<4, false>;
  if (count == 2) resolve = transposed ? load<2, true> : load<2, false>;
  collective(kAllLanes, &operand, resolve, "ldmatrix");
}

}  // namespace mla::emulator
