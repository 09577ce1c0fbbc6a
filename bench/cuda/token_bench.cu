// Products of a decoded token alone: matvec.cuh in the shapes of V2-Lite, and one of 18432 x 7168.
// Each is recorded 40 times or more in a row, over weights that together exceed the caches, and
// replayed; then all of them in turn. Prints us and TB/s of the weights that a product reads.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "backends/cuda/matvec.h"
#include "backends/cuda/product_kernels.h"

namespace mla::cuda::test {
namespace {

constexpr int64_t kWeightBytes = int64_t{600} << 20;
constexpr int kMostCopies = 40;
constexpr int kRepeats = 15;

struct Case {
  const char* name;
  Format format;
  int n, k, n_experts, n_used;
  bool swiglu, summed, normed;
};

constexpr Case kCases[] = {
    {"attn_q, normed", Format::Q4_K, 3072, 2048, 0, 0, false, false, true},
    {"attn_output", Format::Q4_K, 2048, 2048, 0, 0, false, false, false},
    {"shared gate and up, normed", Format::Q4_K, 2816, 2048, 0, 0, true, false, true},
    {"experts' gate and up, normed", Format::Q4_K, 1408, 2048, 64, 6, true, false, true},
    {"experts' down, Q5_0", Format::Q5_0, 2048, 1408, 64, 6, false, true, false},
    {"experts' down, Q8_0", Format::Q8_0, 2048, 1408, 64, 6, false, true, false},
    {"shared down, Q6_K", Format::Q6_K, 2048, 2816, 0, 0, false, false, false},
    {"output, Q6_K, normed", Format::Q6_K, 102400, 2048, 0, 0, false, false, true},
    {"18432 x 7168, Q4_K", Format::Q4_K, 18432, 7168, 0, 0, false, false, false},
    {"18432 x 7168, Q8_0", Format::Q8_0, 18432, 7168, 0, 0, false, false, false},
};

// Operands of a case: numbers that are neither zero nor large, whatever they decode to.
class Operands {
 public:
  Operands(const Case& c, Stream stream) : case_(c) {
    row_bytes_ = packed_row_bytes(c.format, c.k);
    matrix_bytes_ = row_bytes_ * c.n;
    set_bytes_ = matrix_bytes_ * std::max(c.n_experts, 1) * (c.swiglu ? 2 : 1);
    n_sets_ = static_cast<int>(std::clamp<int64_t>(kWeightBytes / set_bytes_, 2, kMostCopies));
    const auto filled = [&](int64_t bytes, int value) {
      auto buffer = device_buffer(static_cast<size_t>(bytes));
      fill_async(buffer.get(), static_cast<std::byte>(value), static_cast<size_t>(bytes), stream);
      return buffer;
    };
    weights_ = filled(set_bytes_ * n_sets_, 0x11);
    x_ = filled(int64_t{4} * c.k * std::max(c.n_used, 1), 0x3f);
    norm_ = filled(int64_t{4} * c.k, 0x3f);
    out_ = filled(int64_t{4} * c.n * std::max(c.n_used, 1), 0);
    std::vector<int32_t> ids(kIds);
    for (int i = 0; i < kIds; ++i) ids[i] = (i * 37 + 11) % std::max(c.n_experts, 1);
    ids_ = filled(sizeof(int32_t) * kIds, 0);
    copy_async(ids_.get(), ids.data(), sizeof(int32_t) * kIds, stream);
    sync_stream(stream);
  }

  int n_sets() const { return n_sets_; }
  int64_t bytes_read() const {
    return matrix_bytes_ * std::max(case_.n_used, 1) * (case_.swiglu ? 2 : 1);
  }

  Product product(int i) const {
    Product p;
    p.x = x_.get();
    p.x_step = sizeof(float);
    p.n = case_.n;
    p.k = case_.k;
    p.w.format = case_.format;
    p.w.data = weights_.get() + i % n_sets_ * set_bytes_;
    p.w.row_stride = row_bytes_;
    p.w.matrix_stride[1] = matrix_bytes_;
    p.up = p.w;
    p.up.data += set_bytes_ / 2;
    p.swiglu = case_.swiglu;
    p.out = reinterpret_cast<float*>(out_.get());
    p.norm = {case_.normed, 1e-6f, norm_.get(), sizeof(float)};
    if (case_.n_experts > 0) route(p, i);
    return p;
  }

 private:
  static constexpr int kIds = 512;

  void route(Product& p, int i) const {
    p.routed = true;
    p.extent[2] = case_.n_used;
    p.ids = ids_.get() + sizeof(int32_t) * static_cast<size_t>(i * case_.n_used % (kIds - 32));
    p.id_stride[1] = sizeof(int32_t);
    p.n_experts = p.n_matrices[1] = case_.n_experts;
    if (!case_.summed) return;
    p.summed = true;
    p.n_slots = case_.n_used;
    p.weights = x_.get();
    p.weight_stride[1] = sizeof(float);
    p.x_stride[2] = int64_t{4} * case_.k;
  }

  Case case_;
  int64_t row_bytes_, matrix_bytes_, set_bytes_;
  int n_sets_;
  std::shared_ptr<std::byte> weights_, x_, norm_, out_, ids_;
};

// Median us of what `enqueue` enqueues, recorded and replayed.
template <class Enqueue>
double replayed_us(Stream stream, const Enqueue& enqueue) {
  enqueue();  // loads the kernels
  sync_stream(stream);
  begin_recording(stream);
  enqueue();
  const RecordedGraph graph = end_recording(stream);
  std::vector<double> us;
  for (int i = 0; i < kRepeats; ++i) {
    Event start, end;
    start.record(stream);
    graph.launch(stream);
    end.record(stream);
    end.sync();
    us.push_back(double{end.since_ms(start)} * 1000);
  }
  std::ranges::sort(us);
  return us[us.size() / 2];
}

int run_all() {
  const DeviceInfo device = device_info(0);
  use_device(0);
  const Stream stream = create_stream();
  const CudaRun run{device, stream, nullptr};
  std::vector<Operands> token;
  double sum = 0;
  for (const Case& c : kCases) {
    const Operands operands(c, stream);
    const int n = std::max(kMostCopies, operands.n_sets());
    const double us = replayed_us(stream,
                                  [&] {
                                    for (int i = 0; i < n; ++i)
                                      run_matvec(run, operands.product(i));
                                  }) /
                      n;
    const auto bytes = static_cast<double>(operands.bytes_read());
    std::printf("%-30s %8.2f us %8.2f MB %6.2f TB/s\n", c.name, us, bytes / 1e6, bytes / us / 1e6);
    if (c.n > 4096) continue;
    token.push_back(operands);
    sum += us;
  }
  const double mixed = replayed_us(stream,
                                   [&] {
                                     for (int i = 0; i < kMostCopies; ++i) {
                                       for (const Operands& operands : token)
                                         run_matvec(run, operands.product(i));
                                     }
                                   }) /
                       kMostCopies;
  std::printf("those of a layer in turn %.2f us, one by one %.2f us\n", mixed, sum);
  return 0;
}

}  // namespace
}  // namespace mla::cuda::test

int main() { return mla::cuda::test::run_all(); }
