// AMX spelled out, for machines without it: the class Tiles of simd/amx.h. What an instruction
// would refuse, or leave undefined, becomes NaN, so that tests see it.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace mla::cpu::MLA_ISA {
namespace {

class Tiles {
 public:
  void shape(int first, int second) {
    const int rows[8] = {first, first, second, second, first, second, 16, 16};
    for (int i = 0; i < 8; ++i) {
      n_rows_[i] = rows[i] >= 1 && rows[i] <= 16 ? rows[i] : 0;
      std::memset(data_[i], 0, sizeof data_[i]);
    }
  }
  template <int tile>
  void zero() {
    std::memset(data_[tile], 0, sizeof data_[tile]);
    spoil_unless(n_rows_[tile] > 0, tile);
  }
  template <int tile>
  void load(const void* p, int64_t stride) {
    std::memset(data_[tile], 0, sizeof data_[tile]);
    for (int r = 0; r < n_rows_[tile]; ++r) {
      std::memcpy(data_[tile][r], static_cast<const char*>(p) + r * stride, sizeof data_[tile][r]);
    }
    spoil_unless(n_rows_[tile] > 0, tile);
  }
  template <int tile>
  void store(void* p, int64_t stride) {
    for (int r = 0; r < n_rows_[tile]; ++r) {
      std::memcpy(static_cast<char*>(p) + r * stride, data_[tile][r], sizeof data_[tile][r]);
    }
  }
  // Even and odd products have a sum each, which starts at zero and takes one fused product after
  // the other; the two and the tile's number are added at the end. Numbers below the normal ones
  // count as zero throughout, also where they come out.
  template <int sum, int x, int w>
  void multiply() {
    for (int m = 0; m < n_rows_[sum]; ++m) {
      for (int n = 0; n < 16; ++n) {
        float part[2] = {0, 0};
        for (int k = 0; k < 16; ++k) {
          for (int i = 0; i < 2; ++i) {
            const float product_x = bf16(data_[x][m][k], i), product_w = bf16(data_[w][k][n], i);
            part[i] = flushed(__builtin_fmaf(product_x, product_w, part[i]));
          }
        }
        const float before = flushed(std::bit_cast<float>(data_[sum][m][n]));
        data_[sum][m][n] = std::bit_cast<uint32_t>(flushed(before + flushed(part[0] + part[1])));
      }
    }
    spoil_unless(n_rows_[sum] == n_rows_[x] && n_rows_[w] == 16, sum);
  }

 private:
  static float flushed(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return (bits & 0x7f800000u) == 0 ? std::bit_cast<float>(bits & 0x80000000u) : value;
  }
  static float bf16(uint32_t pair, int i) {
    return flushed(std::bit_cast<float>(i == 0 ? pair << 16 : pair & 0xffff0000u));
  }
  void spoil_unless(bool good, int tile) {
    if (!good) std::memset(data_[tile], 0xff, sizeof data_[tile]);
  }

  int n_rows_[8] = {};
  uint32_t data_[8][16][16] = {};
};

}  // namespace
}  // namespace mla::cpu::MLA_ISA
