// Attention of the ISA avx512amx by tiles, these spelled out, against the same table's float32.
// Prints a line per failure; the exit status says whether there was one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "backends/cpu/attention_kernels.h"

namespace mla::cpu::isa_avx512amx {
extern const AttentionTable attention_table;
}

namespace {

using namespace mla::cpu;
using Floats = std::vector<float>;

const AttentionTable& table = isa_avx512amx::attention_table;
constexpr double kBound = 2e-4;  // of operands rounded to 8 bits; what is wrong is off by 1e-2
constexpr float kScale = 0.1f;

Floats uniform(int64_t n, float largest) {
  static std::mt19937 generator(7);
  std::uniform_real_distribution<float> number(-largest, largest);
  Floats x(static_cast<size_t>(n));
  for (float& value : x) value = number(generator);
  return x;
}

// Aligned memory that is NaN throughout until it is written.
struct Room {
  explicit Room(int64_t n_bytes)
      : bytes(static_cast<std::byte*>(
            ::operator new (static_cast<size_t>(n_bytes), std::align_val_t{64}))) {
    std::memset(bytes, 0xff, static_cast<size_t>(n_bytes));
  }
  ~Room() { ::operator delete (bytes, std::align_val_t{64}); }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  std::byte* bytes;
};

// A sequence of S cells in float32, and rows of queries [rows, pad(a) + pad(b)] over them.
struct Problem {
  Problem(int64_t rows, int64_t cells, int64_t c, int64_t r, int64_t a, int64_t b)
      : n_rows(rows),
        n_cells(cells),
        latent(uniform(cells * c, 1.6f)),
        rope(uniform(cells * r, 1.6f)),
        q(static_cast<size_t>(rows * (pad_floats(a) + pad_floats(b)))) {
    for (int64_t i = 0; i < rows; ++i) {
      float* row = q.data() + i * (pad_floats(a) + pad_floats(b));
      std::ranges::copy(uniform(a, 1.6f), row);
      std::ranges::copy(uniform(b, 1.6f), row + pad_floats(a));
      visible.push_back(std::max<int64_t>(1, cells - rows + 1 + i));
    }
    plane = {{reinterpret_cast<const std::byte*>(latent.data()), c * 4, mla::Format::F32, c},
             {reinterpret_cast<const std::byte*>(rope.data()), r * 4, mla::Format::F32, r},
             &block,
             cells,
             0};
  }
  int64_t n_rows, n_cells;
  Floats latent, rope, q;
  std::vector<int64_t> visible;
  int32_t block = 0;
  CacheCells plane;
};

// Rows of `width` numbers, divided by their sums, of `row` numbers each in memory.
struct Result {
  Result(int64_t rows, int64_t row)
      : out(static_cast<size_t>(rows * row)),
        max(static_cast<size_t>(rows)),
        sum(static_cast<size_t>(rows)),
        row_floats(row) {
    std::ranges::fill(max, -std::numeric_limits<float>::infinity());
  }
  RunningRows from(int64_t i) {
    return {out.data() + i * row_floats, row_floats, max.data() + i, sum.data() + i};
  }
  Floats values(int64_t width) const {
    Floats x;
    for (size_t i = 0; i < sum.size(); ++i) {
      for (int64_t j = 0; j < width; ++j) {
        x.push_back(out[i * static_cast<size_t>(row_floats) + static_cast<size_t>(j)] / sum[i]);
      }
    }
    return x;
  }
  Floats out, max, sum;
  int64_t row_floats;
};

Floats absorbed(const AbsorbedKernel& kernel, const Problem& p, int64_t c, int64_t r) {
  Room scratch(kernel.scratch_bytes(c, r));
  Result result(p.n_rows, pad_floats(c));
  for (int64_t i = 0; i < p.n_rows; i += kernel.tile_rows) {
    kernel.run({p.plane, 0, p.n_cells, p.q.data() + i * (pad_floats(c) + pad_floats(r)),
                std::min(kernel.tile_rows, p.n_rows - i), p.visible.data() + i, kScale,
                result.from(i), scratch.bytes});
  }
  return result.values(c);
}

// weight [n, c], or [c, n] if across.
void pack(const ExpandedKernels& kernels, const Floats& weight, int64_t n, int64_t c, bool across,
          std::byte* out) {
  const int64_t n_rows = across ? c : n;
  const int64_t width = across ? n : c;
  for (int64_t first = 0; first < n_rows; first += kPadFloats) {
    Floats rows(static_cast<size_t>(kPadFloats * pad_floats(width)));
    const int64_t count = std::min(kPadFloats, n_rows - first);
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(weight.data() + (first + i) * width, width, rows.data() + i * pad_floats(width));
    }
    kernels.pack({rows.data(), pad_floats(width), first, count, n, c, across}, out);
  }
}

Floats expanded(const ExpandedKernels& kernels, const Problem& p, const HeadDims& d,
                const Floats& k_b, const Floats& v_b, bool across) {
  const ExpandedBytes bytes = kernels.bytes(d);
  const int64_t n_panels = (p.n_cells + kPanelCells - 1) / kPanelCells;
  Room latent(n_panels * bytes.latent), rope(n_panels * bytes.rope), keys(n_panels * bytes.keys),
      values(n_panels * bytes.values), weight(bytes.weight), room(bytes.room);
  for (bool of_values : {false, true}) {
    const int64_t n = of_values ? d.v : d.n;
    pack(kernels, of_values ? v_b : k_b, n, d.c, across && !of_values, weight.bytes);
    for (int64_t i = 0; i < n_panels; ++i) {
      const int64_t first = i * kPanelCells;
      const int64_t end = std::min(first + kPanelCells, p.n_cells);
      std::byte* panel = latent.bytes + i * bytes.latent;
      kernels.cells(p.plane, first, end, panel, rope.bytes + i * bytes.rope, room.bytes);
      kernels.expand({weight.bytes, panel, end - first, n, d.c, of_values,
                      of_values ? values.bytes + i * bytes.values : keys.bytes + i * bytes.keys,
                      room.bytes});
    }
  }
  Result result(p.n_rows, d.v);
  for (int64_t i = 0; i < p.n_rows; i += kernels.tile_rows) {
    kernels.attend({d, p.q.data() + i * (pad_floats(d.n) + pad_floats(d.r)),
                    std::min(kernels.tile_rows, p.n_rows - i), keys.bytes, rope.bytes, values.bytes,
                    p.n_cells, p.visible.data() + i, kScale, result.from(i), room.bytes});
  }
  return result.values(d.v);
}

int n_failures = 0;
void compare(const Floats& fast, const Floats& exact, const char* mode, const Problem& p, int64_t a,
             int64_t b) {
  double error = 0, power = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    error += std::pow(double{fast[i]} - exact[i], 2);
    power += std::pow(double{exact[i]}, 2);
  }
  if (error <= kBound * power) return;
  ++n_failures;
  std::printf("%s, %ld rows, %ld cells, %ld, %ld: error %.2g\n", mode, long(p.n_rows),
              long(p.n_cells), long(a), long(b), error / power);
}

}  // namespace

int main() {
  for (int64_t rows : {1, 3, 16, 17, 50, 64, 70}) {
    for (int64_t cells : {1, 5, 31, 33, 64, 100, 200}) {
      for (int64_t c : {96, 512}) {
        const int64_t r = c == 96 ? 6 : 64;
        const Problem p(rows, cells, c, r, c, r);
        compare(absorbed(table.absorbed[0], p, c, r), absorbed(table.absorbed[1], p, c, r),
                "absorbed", p, c, r);
      }
    }
  }
  for (int64_t rows : {1, 20, 64}) {
    for (int64_t cells : {3, 40, 64, 130}) {
      for (const HeadDims& d : {HeadDims{32, 20, 96, 17}, {40, 6, 64, 80}, {128, 64, 96, 128}}) {
        const Problem p(rows, cells, d.c, d.r, d.n, d.r);
        const Floats k_b = uniform(d.n * d.c, 0.2f), v_b = uniform(d.v * d.c, 0.2f);
        for (bool across : {false, true}) {
          compare(expanded(table.expanded[0], p, d, k_b, v_b, across),
                  expanded(table.expanded[1], p, d, k_b, v_b, across), "expanded", p, d.n, d.v);
        }
      }
    }
  }
  return n_failures == 0 ? 0 : 1;
}
