// The tile registers of AMX: eight of up to 16 rows of 64 bytes.
//
// A kernel makes one Tiles, gives it a shape before anything else, and again whenever rows of x run
// short: fewer rows cost less time. Numbers of tiles are template arguments because instructions
// hold them. Tests put a class in its place that spells out the same, and define MLA_AMX_EMULATED.
#pragma once

#if !defined(MLA_AMX_EMULATED)
#include <cstdint>
#include <cstring>

namespace mla::cpu::MLA_ISA {
namespace {

class Tiles {
 public:
  // Tiles 0 and 1 (sums), 4 (of x) get `first` rows, 2, 3 and 5 `second`, 6 and 7 (of w) 16. What
  // they hold is undefined afterwards.
  void shape(int first, int second) {
    if (first == first_ && second == second_) return;  // loading a shape stops all else
    first_ = first;
    second_ = second;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int rows[8] = {first, first, second, second, first, second, 16, 16};
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = static_cast<uint8_t>(rows[i]);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  // So that threads that are done have no tiles to be saved.
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }

  template <int tile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int tile>
  void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(tile) : "memory");
  }
  // sum[m][n] += products of pairs: row m of x, 32 bf16, with column n of w, whose rows are 16
  // pairs each.
  template <int sum, int x, int w>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(x), "i"(w));
  }

 private:
  int first_ = 0, second_ = 0;
};

}  // namespace
}  // namespace mla::cpu::MLA_ISA
#endif
