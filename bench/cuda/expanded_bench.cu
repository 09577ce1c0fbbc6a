// Expanded attention alone, on shapes of real models: some queries checked against float64, then us
// of the whole and of its attention kernel, with TFLOP/s counted as expanded work, 2 (N + R + V)
// per head and visible cell. On capability 9.0 also by the kernel of older devices.
//
// Includes the source that it measures, to run its stages one at a time.
#include "backends/cuda/attention_expanded.cu"
#include "expanded_cases.h"

namespace mla::cuda::test {
namespace {

constexpr int64_t kSamples = 6;  // queries of each span that are compared

double expanded_flop(const Case& c) {
  double pairs = 0;
  for (const Length& s : c.spans) {
    pairs += double(s.n_tokens) * (s.n_cells - s.n_tokens) + 0.5 * s.n_tokens * (s.n_tokens + 1.0);
  }
  return pairs * c.h * 2 * (c.n + c.r + c.v);
}

// Mean us of `body`, enqueued n times.
template <class Body>
double time_us(Stream stream, int n, const Body& body) {
  body();
  Event start, end;
  start.record(stream);
  for (int i = 0; i < n; ++i) body();
  end.record(stream);
  end.sync();
  return double{end.since_ms(start)} * 1000 / n;
}

void report_times(const Case& c, const OnDevice& on, const CudaRun& run) {
  const double flop = expanded_flop(c);
  const int n = static_cast<int>(std::clamp(5e13 / flop, 3.0, 50.0));
  const double all = time_us(run.stream, n, [&] { attention_expanded(on.step(), run); });
  const AttentionArgs a = attention_args(on.step());
  const double attend = time_us(run.stream, n, [&] {
    with_dims(a, run.device, [&]<class D>(D) {
      const ExpandedMemory m = carve(a, D::kRows, c.max_cell_bytes, run.scratch);
      launch(run, plan_expanded, dim3(1), dim3(kPlanThreads), 0, a, m.plan);
      if (m.plan.n_rounds == 1) attend_round<D>(run, expanded_args(a, m), 0);
    });
  });
  std::printf("%-28s %d.%d  all %9.1f us %6.1f TFLOP/s", c.name.c_str(), run.device.major,
              run.device.minor, all, flop / all * 1e-6);
  std::printf("   attention %9.1f us %6.1f TFLOP/s\n", attend, flop / attend * 1e-6);
}

std::vector<Case> real_cases() {
  const float scale = 0.0722f;
  const auto usual = [&](std::string name, int h, std::vector<Length> spans) {
    return Case{
        std::move(name), h,     128,  64, 512, 128, std::move(spans), Format::F16, Format::F16,
        kExpandedBytes,  false, scale};
  };
  return {
      usual("16 heads, 512 on 512", 16, {{512, 512}}),
      usual("16 heads, 4096 on 4096", 16, {{4096, 4096}}),
      usual("16 heads, 2048 on 16384", 16, {{2048, 16384}}),
      usual("16 heads, 16384 on 16384", 16, {{16384, 16384}}),
      usual("16 heads, 512 on 65536", 16, {{512, 65536}}),
      usual("16 heads, 16 x 256", 16, std::vector<Length>(16, {256, 256})),
      usual("128 heads, 2048 on 2048", 128, {{2048, 2048}}),
      usual("128 heads, 2048 on 16384", 128, {{2048, 16384}}),
      {"20 heads of 192/64/256", 20, 192, 64, 512, 256, {{2048, 8192}}},
  };
}

bool run_case(const Case& c, const DeviceInfo& device, Stream stream) {
  const Data d = make_data(c);
  const OnDevice on(c, d, stream);
  const Node& node = *on.step().node;
  bool good = true;
  for (const DeviceInfo& as : {device, portable(device)}) {
    const auto scratch = device_buffer(expanded_scratch_bytes(node, as, c.max_cell_bytes));
    const CudaRun run{as, stream, scratch.get()};
    good = compare(c, d, on, run, kSamples) && good;
    report_times(c, on, run);
    if (as.major != 9) break;
  }
  return good;
}

}  // namespace
}  // namespace mla::cuda::test

int main() {
  using namespace mla::cuda;
  use_device(0);
  const Stream stream = create_stream();
  bool good = true;
  for (const test::Case& c : test::real_cases()) {
    good = test::run_case(c, device_info(0), stream) && good;
  }
  destroy_stream(stream);
  return good ? 0 : 1;
}
