// Operands and results of products, on the host and on the device, for test_gemm.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "backends/cuda/dequantize.h"
#include "backends/cuda/expert_sort.h"
#include "backends/cuda/gemm.h"
#include "backends/cuda/packed.h"
#include "quant/decode.inc.h"

namespace mla::cuda::test {

template <class T>
class Device {
 public:
  explicit Device(size_t n) : n_(n), data_(device_buffer(std::max<size_t>(n, 1) * sizeof(T))) {}
  Device(std::span<const T> host, Stream stream) : Device(host.size()) {
    if (host.empty()) return;
    copy_async(get(), host.data(), host.size_bytes(), stream);
    sync_stream(stream);
  }
  T* get() const { return reinterpret_cast<T*>(data_.get()); }
  std::vector<T> host(Stream stream) const {
    std::vector<T> out(n_);
    copy_async(out.data(), get(), n_ * sizeof(T), stream);
    sync_stream(stream);
    return out;
  }

 private:
  size_t n_;
  std::shared_ptr<std::byte> data_;
};

// 16-bit numbers, and what they are.
struct Numbers {
  std::vector<uint16_t> bits;
  std::vector<double> values;
};

inline uint16_t to_bits(float value, Operand operand) {
  return operand == Operand::f16 ? float_to_half(value) : float_to_bf16(value);
}
inline float from_bits(uint16_t bits, Operand operand) {
  return operand == Operand::f16 ? half_to_float(bits) : bf16_to_float(bits);
}

// rows x stride of which the first k columns are numbers, the next up to a multiple of 8 zeros, and
// the rest what no product may touch.
inline Numbers random_rows(std::mt19937& rng, int64_t rows, int k, int64_t stride,
                           Operand operand) {
  std::normal_distribution<float> normal;
  Numbers out;
  out.bits.assign(static_cast<size_t>(rows * stride), to_bits(NAN, operand));
  out.values.assign(static_cast<size_t>(rows * stride), 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < pad_k(k); ++c) {
      const auto at = static_cast<size_t>(r * stride + c);
      out.bits[at] = to_bits(c < k ? normal(rng) : 0.0f, operand);
      out.values[at] = from_bits(out.bits[at], operand);
    }
  }
  return out;
}

inline std::vector<float> random_floats(std::mt19937& rng, size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& x : out) x = normal(rng);
  return out;
}

struct Dot {
  double sum = 0, magnitude = 0;
};
inline Dot dot(const double* a, const double* b, int k) {
  Dot d;
  for (int i = 0; i < k; ++i) {
    d.sum += a[i] * b[i];
    d.magnitude += std::abs(a[i] * b[i]);
  }
  return d;
}

inline double silu(double x) { return x / (1.0 + std::exp(-x)); }

// One comparison of many numbers: the worst quotient of error and bound, and where it is.
class Worst {
 public:
  void add(double got, double expected, double bound, int64_t at) {
    const double error = std::isnan(got) != std::isnan(expected) ? INFINITY
                         : std::isnan(got)                       ? 0.0
                                                                 : std::abs(got - expected) / bound;
    if (!(error > worst_)) return;
    worst_ = error, at_ = at, got_ = got, expected_ = expected;
  }
  bool report(const std::string& name) const {
    const bool good = worst_ <= 1.0;
    std::printf("%s  %-70s worst %.3g of its bound", good ? "ok  " : "FAIL", name.c_str(), worst_);
    if (!good) std::printf(" at %lld: %g, not %g", static_cast<long long>(at_), got_, expected_);
    std::printf("\n");
    std::fflush(stdout);
    return good;
  }

 private:
  double worst_ = -1, got_ = 0, expected_ = 0;
  int64_t at_ = 0;
};

// A packed row-major weight and its values.
struct Weight {
  std::vector<std::byte> packed;
  std::vector<float> values;
  int64_t row_bytes;
};

template <class Block>
void decode(const std::byte* from, float* out) {
  Block b;
  std::memcpy(&b, from, sizeof(b));
  block::decode_block(b, out);
}

inline void decode(Format format, const std::byte* from, float* out) {
  switch (format) {
#define MLA_FORMAT(name, gguf, elems, bytes) \
  case Format::name:                         \
    return decode<block::name>(from, out);
#include "quant/formats.def"
    default:
      return;
  }
}

// Any bytes are quants; the 2-byte fields that hold scales get halves of about 0.01.
inline Weight random_weight(std::mt19937& rng, Format format, int64_t rows, int64_t k) {
  const FormatTraits& t = traits(format);
  const auto& fields = packed_fields(format);
  const int64_t n_blocks = k / t.block_elems;
  Weight w{{}, std::vector<float>(static_cast<size_t>(rows * k)), packed_row_bytes(format, k)};
  w.packed.resize(static_cast<size_t>(rows * w.row_bytes));
  std::vector<std::byte> block(static_cast<size_t>(t.block_bytes));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < n_blocks; ++b) {
      for (std::byte& x : block) x = static_cast<std::byte>(rng() & 255u);
      for (const Field& f : fields) {  // d, or d and a min: short fields or heads
        const bool head = f.bytes == 2 || f.offset == 0;
        const int halves = f.bytes == 2 || f.bytes == 8 ? 1 : 2;
        const bool scales = f.bytes > 0 && (f.bytes == 2 || f.bytes == 4 || f.bytes == 8 ||
                                            (head && f.bytes == 16 && format != Format::Q2_K));
        if (!scales || (format == Format::Q5_0 && f.bytes == 4) ||
            (format == Format::Q5_1 && f.offset != 0)) {
          continue;
        }
        for (int h = 0; h < halves; ++h) {
          const uint16_t d = float_to_half(0.01f * static_cast<float>(1 + rng() % 100) / 50.0f);
          std::memcpy(block.data() + f.offset + 2 * h, &d, 2);
        }
      }
      decode(format, block.data(), w.values.data() + r * k + b * t.block_elems);
      for (int p = 0; p < kMaxPlanes; ++p) {
        const Field& f = fields[static_cast<size_t>(p)];
        std::memcpy(
            w.packed.data() + r * w.row_bytes + plane_offset(fields, p, n_blocks) + b * f.bytes,
            block.data() + f.offset, static_cast<size_t>(f.bytes));
      }
    }
  }
  return w;
}

struct Context {
  DeviceInfo device;
  Stream stream;
  std::string only;
  bool good = true;

  CudaRun run() const { return {device, stream, nullptr}; }
  bool wants(const std::string& name) const { return name.find(only) != std::string::npos; }
  void report(const Worst& worst, const std::string& name) { good = worst.report(name) && good; }
};

// All cases on the first device.
inline int run_all(void (*all)(Context&), const char* only) {
  Context context{device_info(0), create_stream(), only};
  std::printf("%s, %d.%d\n", context.device.name.c_str(), context.device.major,
              context.device.minor);
  all(context);
  destroy_stream(context.stream);
  return context.good ? 0 : 1;
}

}  // namespace mla::cuda::test
