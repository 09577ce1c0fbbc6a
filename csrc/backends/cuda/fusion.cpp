#include "backends/cuda/fusion.h"

#include <algorithm>

#include "backends/cuda/attention.h"
#include "backends/cuda/product.h"

namespace mla::cuda {
namespace {

// Tokens up to which norms and rotations are worth taking over: what takes them does them for each
// of its blocks.
constexpr int kMostRows = 16;
// Numbers of a cell that a block makes in shared memory.
constexpr int64_t kWidestCell = 8192;

struct Range {
  const std::byte *begin, *end;
  bool meets(const Range& other) const { return begin < other.end && other.begin < end; }
};

Range range_of(const Tensor& t) {
  const std::byte* begin = t.data + t.low_bytes();
  return {begin, begin + t.span_bytes()};
}

bool is_constant(const Node* node) {
  return root_of(const_cast<Node*>(node)).node->op == Op::weight;
}

// What a step reads that other steps may write.
template <class F>
void for_each_read(const Step& step, F&& f) {
  const size_t n = step.node == nullptr ? 1 : step.node->inputs.size();
  for (size_t i = 0; i < n; ++i) {
    if (step.in[i].data == nullptr) continue;
    if (step.node != nullptr && is_constant(step.node->input(i))) continue;
    f(range_of(step.in[i]));
  }
}

bool reads(const Step& step, const Range& range) {
  bool found = false;
  for_each_read(step, [&](const Range& r) { found = found || r.meets(range); });
  return found;
}

int n_operands_in(const Step& step, const Range& range) {
  int n = 0;
  for_each_read(step, [&](const Range& r) { n += r.meets(range) ? 1 : 0; });
  return n;
}

bool is(const Step& step, Op op) { return step.node != nullptr && step.node->op == op; }

// Whether a step writes to some of that memory: also what has no result of its own.
bool writes(const Step& step, const Range& range) {
  const auto meets = [&](const Tensor& t) { return range_of(t).meets(range); };
  return meets(step.out) || (is(step, Op::cache_write) && (meets(step.in[0]) || meets(step.in[1])));
}

// Whether the kernels of a step would have nothing to do.
bool is_idle(const Step& step) {
  const Tensor& rows = is(step, Op::cache_write) ? step.in[2] : step.out;
  return rows.shape.n_elems() == 0;
}

bool same_shape(const Tensor& a, const Tensor& b) {
  return a.shape.rank == b.shape.rank && a.shape.extent == b.shape.extent;
}

bool same_elements(const Tensor& a, const Tensor& b) {
  return a.data == b.data && a.format == b.format && a.shape.n_elems() == b.shape.n_elems() &&
         a.shape.extent[kMaxRank - 1] == b.shape.extent[kMaxRank - 1] && a.is_contiguous() &&
         b.is_contiguous();
}

class Fusion {
 public:
  Fusion(std::span<const Step> steps, const DeviceInfo& device)
      : steps_(steps), device_(device), launches_(steps.size()), gone_(steps.size()) {
    for (size_t i = 0; i < steps.size(); ++i) launches_[i].step = &steps[i];
  }

  std::vector<Launch> run() {
    for (size_t i = 0; i < steps_.size(); ++i) {
      if (is(steps_[i], Op::rms_norm)) give(i, Op::rms_norm);
      if (is(steps_[i], Op::rope)) give(i, Op::rope);
    }
    std::vector<Launch> kept;
    for (size_t i = 0; i < steps_.size(); ++i) {
      if (!gone_[i]) kept.push_back(launches_[i]);
    }
    return kept;
  }

 private:
  // Hands step i to all that read its result, if each of them can take it.
  void give(size_t i, Op op) {
    const Step& step = steps_[i];
    const Range result = range_of(step.out);
    std::vector<size_t> readers;
    for (size_t j = i + 1; j < steps_.size() && range_is_his(j, i, result); ++j) {
      if (reads(steps_[j], result)) readers.push_back(j);
    }
    if (static_cast<int>(readers.size()) != step.n_readers || readers.empty()) return;
    for (const size_t j : readers) {
      if (!takes(j, step, op) || !inputs_last(i, j)) return;
    }
    for (const size_t j : readers) place(j, op) = &step;
    gone_[i] = true;
  }

  // Whether the memory still holds the result of step i where step j begins.
  bool range_is_his(size_t j, size_t i, const Range& result) const {
    return j == i + 1 || !writes(steps_[j - 1], result);
  }

  // Whether what step i reads is still there while step j runs.
  bool inputs_last(size_t i, size_t j) const {
    for (size_t k = i + 1; k <= j; ++k) {
      bool spoilt = false;
      for_each_read(steps_[i], [&](const Range& r) { spoilt = spoilt || writes(steps_[k], r); });
      if (spoilt) return false;
    }
    return true;
  }

  const Step*& place(size_t j, Op op) {
    Neighbours& n = launches_[j].neighbours;
    return op == Op::rms_norm ? n.norm : n.rope;
  }

  bool takes(size_t j, const Step& step, Op op) {
    const Step& reader = steps_[j];
    if (reader.node == nullptr || place(j, op) != nullptr) return false;
    if (n_operands_in(reader, range_of(step.out)) != 1)
      return false;  // the others need it as it is
    if (op == Op::rms_norm && (is(reader, Op::matmul) || is(reader, Op::swiglu_matmul))) {
      return same_elements(reader.in[0], step.out) && product_takes_norm(reader, step, device_);
    }
    if (op == Op::rope && is(reader, Op::mla_attention)) {
      return step.out.shape.extent[1] <= kMostRows && step.in[0].format == Format::F32 &&
             same_shape(reader.in[1], step.out) && same_elements(reader.in[1], step.out) &&
             attention_takes_rope(*reader.node, device_);
    }
    if (is(reader, Op::cache_write)) {
      const Tensor& row = reader.in[op == Op::rms_norm ? 2 : 3];
      const int64_t width = reader.in[2].shape.extent[3] + reader.in[3].shape.extent[3];
      return step.out.shape.extent[2] <= kMostRows && width <= kWidestCell &&
             same_shape(row, step.out) && same_elements(row, step.out);
    }
    return false;
  }

  std::span<const Step> steps_;
  const DeviceInfo& device_;
  std::vector<Launch> launches_;
  std::vector<char> gone_;
};

bool touches(const Launch& launch, const Range& range) {
  bool found = reads(*launch.step, range);
  for (const Step* step : {launch.neighbours.norm, launch.neighbours.rope}) {
    found = found || (step != nullptr && reads(*step, range));
  }
  return found;
}

// Whether the launch may run beside those before it, back to the last one that waited first.
bool is_apart(const Launch& launch, std::span<const Launch> before) {
  const Range out = range_of(launch.step->out);
  return std::ranges::none_of(before, [&](const Launch& b) {
    return writes(*b.step, out) || touches(launch, range_of(b.step->out)) || touches(b, out);
  });
}

bool is_product(const Step& step) {
  return is(step, Op::matmul) || is(step, Op::swiglu_matmul) || is(step, Op::matmul_indexed);
}

// Products run beside products; the queries of attention beside the write to its cache, for which
// only the kernel after theirs waits.
bool may_overlap(const Launch& launch, std::span<const Launch> before, const DeviceInfo& device) {
  if (is_product(*launch.step)) {
    return std::ranges::all_of(before, [](const Launch& b) { return is_product(*b.step); }) &&
           product_waits_last(*launch.step, device) && is_apart(launch, before);
  }
  if (!is(*launch.step, Op::mla_attention) || before.size() != 1 ||
      !is(*before[0].step, Op::cache_write)) {
    return false;
  }
  const Step* rope = launch.neighbours.rope;
  const Range out = range_of(launch.step->out);
  const auto cache = std::span(before[0].step->in).first(2);
  return attention_takes_rope(*launch.step->node, device) && !touches(before[0], out) &&
         std::ranges::none_of(cache, [&](const Tensor& plane) {
           const Range written = range_of(plane);
           return range_of(launch.step->in[0]).meets(written) ||
                  range_of(launch.step->in[1]).meets(written) ||
                  (rope != nullptr && reads(*rope, written));
         });
}

void overlap(std::vector<Launch>& launches, const DeviceInfo& device) {
  size_t first = 0;  // the last one that waits first
  for (size_t i = 1; i < launches.size(); ++i) {
    if (may_overlap(launches[i], std::span(launches).subspan(first, i - first), device)) {
      launches[i].overlap = Overlap::waits_last;
    } else {
      first = i;
    }
  }
}

}  // namespace

std::vector<Launch> fuse(std::span<const Step> steps, const DeviceInfo& device) {
  std::vector<Launch> launches = Fusion(steps, device).run();
  // What enqueues nothing would seem to wait for what is ahead of it.
  std::erase_if(launches, [](const Launch& launch) { return is_idle(*launch.step); });
  overlap(launches, device);
  return launches;
}

}  // namespace mla::cuda
