// The products of the ISA avx512amx against sums in double, its tiles spelled out. Prints a line
// per failure; the exit status says whether there was one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "backends/cpu/kernels.h"
#include "base/half.h"
#include "quant/decode.h"

namespace mla::cpu::isa_avx512amx {
extern const SlabTable slab_table;
}

namespace {

using mla::Format;
using mla::cpu::MatmulTile;
using mla::cpu::SlabEntry;
using Floats = std::vector<float>;
using Rows = std::vector<std::byte>;

const mla::cpu::SlabTable& table = mla::cpu::isa_avx512amx::slab_table;

// Rows of x and w as bf16 are each off by 2^-9 at most, on average by far less.
constexpr double kBound = 2e-5;

struct Case {
  Format format;
  int64_t n, k;
  int n_x;
  bool scattered;  // rows of x at uneven distances
  bool accumulate;
};

// Random blocks whose halves, anywhere in them, are tame numbers: every half is 0.0x.
Rows random_weight(Format format, int64_t n, int64_t k, std::mt19937& random) {
  Rows rows(static_cast<size_t>(n * mla::row_bytes(format, k)));
  std::normal_distribution<float> normal;
  const auto put = [&](size_t at, uint16_t bits) { std::memcpy(&rows[at], &bits, sizeof bits); };
  for (size_t i = 0; i + 2 <= rows.size(); i += 2) {
    const auto bits = static_cast<uint16_t>(random());
    if (format == Format::BF16) {
      put(i, mla::float_to_bf16(normal(random)));
    } else if (format == Format::F16) {
      put(i, mla::float_to_half(normal(random)));
    } else if (format == Format::F32) {
      if (i % 4 == 0) {
        const float value = normal(random);
        std::memcpy(&rows[i], &value, sizeof value);
      }
    } else {
      put(i, static_cast<uint16_t>((bits & 0x83ff) | 0x2000));  // 2^-7 to 2^-6, either sign
    }
  }
  return rows;
}

double error_of(const Case& c) {
  std::mt19937 random(static_cast<uint32_t>(c.k + c.n + c.n_x));
  std::normal_distribution<float> normal(0.1f);
  const SlabEntry& entry = table.rows[static_cast<size_t>(c.format)];
  const Rows w = random_weight(c.format, c.n, c.k, random);
  Floats values(static_cast<size_t>(c.n * c.k)), x(static_cast<size_t>(c.n_x * c.k));
  mla::decode(c.format, w.data(), c.n * c.k, values.data());
  for (float& value : x) value = normal(random);

  const size_t x_bytes = entry.packed_bytes(c.k);
  auto* packed = static_cast<std::byte*>(std::aligned_alloc(64, 3 * x_bytes * c.n_x));
  auto* room = static_cast<std::byte*>(std::aligned_alloc(64, (table.room_bytes + 63) / 64 * 64));
  Floats y(static_cast<size_t>(c.n_x * c.n), 3.0f);
  std::vector<const std::byte*> x_rows;
  std::vector<float*> y_rows;
  for (int i = 0; i < c.n_x; ++i) {
    const int place = c.scattered ? 2 * i + (i & 1) : i;
    std::byte* row = packed + static_cast<size_t>(place) * x_bytes;
    entry.pack(reinterpret_cast<const std::byte*>(&x[static_cast<size_t>(i * c.k)]), Format::F32, 4,
               c.k, row);
    x_rows.push_back(row);
    y_rows.push_back(&y[static_cast<size_t>(i * c.n)]);
  }
  const int64_t w_row = mla::row_bytes(c.format, c.k);
  entry.kernel(
      {w.data(), w_row, 0, c.n, c.k, x_rows.data(), y_rows.data(), c.n_x, c.accumulate, room});
  double wrong = 0, all = 0;
  for (int64_t i = 0; i < c.n_x * c.n; ++i) {
    double sum = c.accumulate ? 3.0 : 0.0;
    for (int64_t k = 0; k < c.k; ++k) {
      sum += static_cast<double>(x[static_cast<size_t>(i / c.n * c.k + k)]) *
             static_cast<double>(values[static_cast<size_t>(i % c.n * c.k + k)]);
    }
    const double off = static_cast<double>(y[static_cast<size_t>(i)]) - sum;
    wrong += off * off;
    all += sum * sum;
  }
  std::free(packed);
  std::free(room);
  return wrong / all;
}

bool check(const Case& c) {
  const double error = error_of(c);
  if (error <= kBound) return true;
  std::printf("%s, w %ld x %ld, %d rows of x%s%s: error %g\n",
              std::string(mla::format_name(c.format)).c_str(), static_cast<long>(c.n),
              static_cast<long>(c.k), c.n_x, c.scattered ? ", scattered" : "",
              c.accumulate ? ", added" : "", error);
  return false;
}

}  // namespace

int main() {
  int n_failed = 0;
  for (int f = 0; f < mla::kFormatCount; ++f) {
    const auto format = static_cast<Format>(f);
    if (format == Format::I32) continue;
    const int64_t block = mla::traits(format).block_elems;
    const int64_t some = block == 1 ? 77 : 3 * block;
    for (int n_x : {1, 15, 16, 17, 32, 33, 50}) {
      for (bool scattered : {false, true}) {
        n_failed += !check({format, 33, some, n_x, scattered, scattered});
      }
    }
    n_failed += !check({format, 20, 2048 + some, 40, true, true});
    n_failed += !check({format, 64, 2048 + 256, 9, false, false});
  }
  return n_failed == 0 ? 0 : 1;
}
