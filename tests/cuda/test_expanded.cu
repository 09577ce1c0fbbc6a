// Expanded attention against float64, on a device or emulated: spans, rounds, formats, widths; on
// capability 9.0 also by the kernels of older devices. Exit status 0: all good. An argument limits
// the run to cases whose name contains it.
#include "expanded_cases.h"

namespace mla::cuda::test {
namespace {

std::vector<Case> small_cases() {
  const auto small = [](size_t cells, int row) { return cells * size_t(row); };
  return {
      {"one token", 1, 16, 16, 32, 16, {{1, 1}}},
      {"fixture dims", 2, 32, 16, 64, 32, {{70, 130}}},
      {"odd widths", 3, 24, 6, 40, 8, {{33, 90}}, Format::F32, Format::F32},
      {"rounds", 2, 16, 8, 32, 16, {{70, 600}}, Format::F16, Format::F16, small(256, 200)},
      {"batch", 2, 32, 16, 64, 32, {{1, 40}, {9, 9}, {1, 300, false}, {65, 150}, {2, 130}}},
      {"batch in rounds",
       2,
       16,
       8,
       32,
       16,
       {{130, 260}, {5, 5, false}, {40, 300}, {1, 129}},
       Format::BF16,
       Format::BF16,
       small(128, 200)},
      {"q8 cells, legacy k_b",
       2,
       32,
       16,
       64,
       32,
       {{20, 80}},
       Format::Q8_0,
       Format::F16,
       kExpandedBytes,
       true},
      {"wide values", 1, 192, 64, 64, 256, {{66, 100}}},
      {"real dims", 1, 128, 64, 512, 128, {{140, 200}, {3, 70}}},
      {"real dims in rounds",
       1,
       128,
       64,
       96,
       128,
       {{150, 300}, {130, 400}},
       Format::F16,
       Format::F16,
       size_t{256 * 800}},
      {"negative scale",
       2,
       32,
       16,
       64,
       32,
       {{20, 80}},
       Format::F16,
       Format::F16,
       kExpandedBytes,
       false,
       -0.2f},
  };
}

bool run_case(const Case& c, const DeviceInfo& device, Stream stream) {
  const Data d = make_data(c);
  const OnDevice on(c, d, stream);
  bool good = true;
  for (const DeviceInfo& as : {device, portable(device)}) {
    if (as.capability() > device.capability()) continue;
    if (!expanded_fits(*on.step().node, as)) {
      std::printf("%-28s does not fit\n", c.name.c_str());
      continue;
    }
    const auto scratch =
        device_buffer(expanded_scratch_bytes(*on.step().node, as, c.max_cell_bytes));
    good = compare(c, d, on, {as, stream, scratch.get()}, 1'000'000) && good;
  }
  return good;
}

}  // namespace
}  // namespace mla::cuda::test

int main(int argc, char** argv) {
  using namespace mla::cuda;
  use_device(0);
  const Stream stream = create_stream();
  bool good = true;
  for (const test::Case& c : test::small_cases()) {
    if (argc > 1 && c.name.find(argv[1]) == std::string::npos) continue;
    good = test::run_case(c, device_info(0), stream) && good;
  }
  destroy_stream(stream);
  return good ? 0 : 1;
}
