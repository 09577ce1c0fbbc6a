// Operands of products, see dequantize.h, against float64, on a device or emulated.
// Exit status 0: all good. An argument limits the run to cases whose name contains it.
#include <algorithm>

#include "backends/cuda/dequantize.h"
#include "gemm_cases.h"

namespace mla::cuda::test {
namespace {

void dequantized(Context& t, Format format, int64_t rows, int64_t k, int64_t k_padded) {
  const std::string name = "dequantize " + std::string(format_name(format)) + " " +
                           std::to_string(rows) + " x " + std::to_string(k);
  if (!t.wants(name)) return;
  std::mt19937 rng(3);
  const Weight w = random_weight(rng, format, rows, k);
  const Device<std::byte> packed(w.packed, t.stream);
  View view{packed.get(), format, {1, 1, rows, k}, {0, 0, w.row_bytes, 0}};
  const int64_t begin = 1;
  const Device<uint16_t> plain(size_t((rows - begin) * k_padded));
  dequantize_rows(t.run(), view, begin, rows, Operand::f16, plain.get(), k_padded);
  const std::vector<uint16_t> out = plain.host(t.stream);
  Worst worst;
  for (int64_t r = begin; r < rows; ++r) {
    for (int64_t c = 0; c < k_padded; ++c) {
      const double expected = c < k ? w.values[size_t(r * k + c)] : 0.0f;
      worst.add(half_to_float(out[size_t((r - begin) * k_padded + c)]), expected,
                std::abs(expected) / 2000 + 1e-6, r * k_padded + c);
    }
  }
  t.report(worst, name);

  const int64_t r_padded = pad_k(rows);
  const Device<uint16_t> turned(size_t(k * r_padded));
  dequantize_transposed(t.run(), view, Operand::f16, turned.get(), r_padded);
  const std::vector<uint16_t> out_t = turned.host(t.stream);
  Worst worst_t;
  for (int64_t c = 0; c < k; ++c) {
    for (int64_t r = 0; r < r_padded; ++r) {
      const double expected = r < rows ? w.values[size_t(r * k + c)] : 0.0f;
      worst_t.add(half_to_float(out_t[size_t(c * r_padded + r)]), expected,
                  std::abs(expected) / 2000 + 1e-6, c * r_padded + r);
    }
  }
  t.report(worst_t, name + " transposed");
}

// x [2, 3, 5, k] F32 with its dims permuted in memory, or contiguous.
void prepared(Context& t, int64_t k, bool permuted, Operand operand, float magnitude) {
  const std::string name = "prepare " + std::to_string(k) + (permuted ? " permuted" : "") +
                           (operand == Operand::bf16 ? " bf16" : "") + " x " +
                           std::to_string(magnitude);
  if (!t.wants(name)) return;
  std::mt19937 rng(4);
  std::vector<float> x = random_floats(rng, size_t(30 * k));
  for (float& v : x) v *= magnitude;
  std::fill_n(x.begin(), permuted ? 0 : k, 0.0f);
  const Device<float> dx(x, t.stream);
  View view{reinterpret_cast<std::byte*>(dx.get()),
            Format::F32,
            {2, 3, 5, k},
            {60 * k, 20 * k, 4 * k, 4}};
  if (permuted) view = {view.data, Format::F32, {2, 3, 5, k}, {4, 8, 24, 120}};
  const int64_t k_padded = pad_k(k) + 8;
  const Device<uint16_t> rows(size_t(30 * k_padded));
  const Device<float> scale(30);
  prepare_rows(t.run(), view, operand, rows.get(), scale.get(), k_padded);
  const std::vector<uint16_t> out = rows.host(t.stream);
  const std::vector<float> scales = scale.host(t.stream);
  Worst worst;
  for (int64_t r = 0; r < 30; ++r) {
    float largest = 0;
    for (int64_t c = 0; c < k_padded; ++c) {
      const int64_t at = r / 15 * view.stride[0] + r / 5 % 3 * view.stride[1] +
                         r % 5 * view.stride[2] + c * view.stride[3];
      const double expected = c < k ? x[size_t(at / 4)] : 0.0f;
      const float stored = from_bits(out[size_t(r * k_padded + c)], operand);
      largest = std::max(largest, std::abs(stored));
      const double relative = operand == Operand::f16 ? 1.0 / 2000 : 1.0 / 250;
      worst.add(double(stored) * scales[size_t(r)], expected,
                std::abs(expected) * relative + 1e-9 * magnitude, r * k_padded + c);
    }
    if (largest > 0 && operand == Operand::f16) worst.add(largest, 24576, 8192.1, -r);
  }
  t.report(worst, name);
}

// F32, F16 and BF16 weights with rows begun at odd places: copied, padded and converted.
void converted(Context& t, Format format, Operand operand) {
  const std::string name = "convert " + std::string(format_name(format)) +
                           (operand == Operand::bf16 ? " to bf16" : " to f16");
  if (!t.wants(name)) return;
  std::mt19937 rng(5);
  const int64_t rows = 6, k = 37, stride = 39, k_padded = 48;
  const std::vector<float> x = random_floats(rng, size_t(rows * stride));
  const int64_t bytes = traits(format).block_bytes;
  std::vector<std::byte> stored(size_t(rows * stride * bytes));
  std::vector<double> values;
  for (size_t i = 0; i < x.size(); ++i) {
    const uint16_t bits = to_bits(x[i], format == Format::F16 ? Operand::f16 : Operand::bf16);
    std::memcpy(&stored[i * size_t(bytes)],
                format == Format::F32 ? static_cast<const void*>(&x[i]) : &bits, size_t(bytes));
    values.push_back(format == Format::F32   ? x[i]
                     : format == Format::F16 ? half_to_float(bits)
                                             : bf16_to_float(bits));
  }
  const Device<std::byte> dx(stored, t.stream);
  const View view{dx.get(), format, {1, 2, 3, k}, {0, 3 * stride * bytes, stride * bytes, bytes}};
  const Device<uint16_t> plain(size_t(rows * k_padded)), turned(size_t(2 * k * 8));
  dequantize_rows(t.run(), view, 0, rows, operand, plain.get(), k_padded);
  dequantize_transposed(t.run(), view, operand, turned.get(), 8);
  const std::vector<uint16_t> out = plain.host(t.stream), out_t = turned.host(t.stream);
  Worst worst;
  const double relative = operand == Operand::f16 ? 1.0 / 2000 : 1.0 / 250;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < k_padded; ++c) {
      const double expected = c < k ? values[size_t(r * stride + c)] : 0.0;
      worst.add(from_bits(out[size_t(r * k_padded + c)], operand), expected,
                std::abs(expected) * relative + 1e-7, r * k_padded + c);
      if (c >= k) continue;
      const int64_t at = (r / 3 * k + c) * 8;
      worst.add(from_bits(out_t[size_t(at + r % 3)], operand), expected,
                std::abs(expected) * relative + 1e-7, at);
      worst.add(from_bits(out_t[size_t(at + 3 + r % 3)], operand), 0, 1e-30, at);
    }
  }
  t.report(worst, name);
}

void all(Context& t) {
  constexpr Operand bf16 = Operand::bf16;
#define MLA_FORMAT(name, gguf, elems, bytes) \
  dequantized(t, Format::name, 5, 2 * (elems), 2 * (elems) + 8);
#include "quant/formats.def"
  dequantized(t, Format::Q4_K, 70, 1280, 1280);
  for (const Format format : {Format::F32, Format::F16, Format::BF16}) {
    converted(t, format, Operand::f16);
    converted(t, format, Operand::bf16);
  }
  prepared(t, 37, false, Operand::f16, 1e7f);
  prepared(t, 64, false, Operand::f16, 1e-7f);
  prepared(t, 1100, false, Operand::f16, 1.0f);
  prepared(t, 29, true, Operand::f16, 3e30f);
  prepared(t, 40, false, bf16, 1e7f);
}

}  // namespace
}  // namespace mla::cuda::test

int main(int argc, char** argv) {
  return mla::cuda::test::run_all(mla::cuda::test::all, argc > 1 ? argv[1] : "");
}
