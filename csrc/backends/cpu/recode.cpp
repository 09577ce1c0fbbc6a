#include "backends/cpu/recode.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace mla::cpu {
namespace {

// Least importance of a column, the mean being 1: too little to be seen in the error, enough to
// keep runs of unimportant numbers from being given up.
constexpr float kLeastImportance = 1e-4f;

void check_weights(const char* operation, Format format) {
  MLA_CHECK(FormatError, format != Format::I32, operation, ": ", format_name(format),
            " is no format of weights");
}

[[noreturn]] void refuse(Format format, const EncodeRun& run) {
  for (int64_t i = 0; i < run.n; ++i) {
    const int64_t at = run.column + i;
    MLA_CHECK(FormatError, std::isfinite(run.x[i]), "quantize: element ", at % run.k, " is ",
              run.x[i], " (row ", at / run.k, "); ", format_name(format),
              " holds finite numbers only");
  }
  const float widest = *std::max_element(
      run.x, run.x + run.n, [](float a, float b) { return std::fabs(a) < std::fabs(b); });
  throw FormatError(concat("quantize: the scale of a block of ", format_name(format),
                           " exceeds binary16; the largest number is ", widest));
}

}  // namespace

void encode(const KernelTable& kernels, Format format, const EncodeRun& run) {
  check_weights("quantize", format);
  row_bytes(format, run.n);  // checks n
  const EncodeKernel blocks = kernels.encode->blocks[static_cast<size_t>(format)];
  if (blocks == nullptr) {
    kernels.row->from_f32(run.x, run.n, format, run.out);
  } else if (!blocks(run)) {
    refuse(format, run);
  }
}

void decode(const KernelTable& kernels, Format format, const std::byte* in, int64_t n, float* out) {
  check_weights("dequantize", format);
  row_bytes(format, n);
  kernels.matmul->decode(format, in, n, out);
}

std::vector<float> normalized_importance(const float* importance, int64_t k) {
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    MLA_CHECK(FormatError, std::isfinite(importance[i]) && importance[i] >= 0,
              "quantize: importance of column ", i, " is ", importance[i],
              "; accepted are finite numbers from 0");
    sum += importance[i];
  }
  if (sum == 0) return {};
  std::vector<float> normalized(static_cast<size_t>(k));
  const double per_mean = static_cast<double>(k) / sum;
  for (int64_t i = 0; i < k; ++i) {
    normalized[static_cast<size_t>(i)] =
        std::max(static_cast<float>(importance[i] * per_mean), kLeastImportance);
  }
  return normalized;
}

}  // namespace mla::cpu
