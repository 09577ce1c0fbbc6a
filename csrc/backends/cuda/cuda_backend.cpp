#include "backends/cuda/cuda_backend.h"

#include <algorithm>
#include <array>

#include "backends/cuda/ops/ops.h"
#include "backends/cuda/pack.h"
#include "backends/cuda/packed.h"
#include "backends/cuda/problems.h"
#include "backends/cuda/program.h"
#include "base/error.h"

namespace mla::cuda {
namespace {

struct OpRow {
  Op op;
  const CudaOp* impl;
};
constexpr auto kOps = std::to_array<OpRow>({
    {Op::copy, &copy_op},
    {Op::add, &add_op},
    {Op::get_rows, &get_rows_op},
    {Op::rms_norm, &rms_norm_op},
    {Op::rope, &rope_op},
    {Op::softmax, &softmax_op},
    {Op::swiglu, &swiglu_op},
    {Op::matmul, &matmul_op},
    {Op::matmul_indexed, &matmul_indexed_op},
    {Op::swiglu_matmul, &swiglu_matmul_op},
    {Op::route, &route_op},
    {Op::top_k, &top_k_op},
    {Op::cache_write, &cache_write_op},
    {Op::mla_attention, &mla_attention_op},
});

class StreamMark final : public Mark {
 public:
  StreamMark(int device, Stream stream) : device_(device), stream_(stream) {}
  void set() override {
    use_device(device_);
    event_.record(stream_);
  }
  void wait() const override { event_.sync(); }
  const Event& event() const { return event_; }

 private:
  int device_;
  Stream stream_;
  Event event_{false};
};

const CudaOp* find(Op op) {
  for (const OpRow& row : kOps) {
    if (row.op == op) return row.impl;
  }
  return nullptr;
}

}  // namespace

CudaBackend::CudaBackend(int index, bool record) : name_(concat("cuda:", index)), record_(record) {
  device_ = device_info(index);
  check_capability(device_);
  use_device(index);
  stream_ = create_stream();
  staging_ = std::make_unique<Staging>(stream_);
}

CudaBackend::~CudaBackend() {
  staging_.reset();
  destroy_stream(stream_);
}

std::string CudaBackend::refusal(const Node& node) const {
  const CudaOp* op = find(node.op);
  return op == nullptr ? "no kernel" : std::string(op->refusal(node, device_));
}

bool CudaBackend::supports_op(const Node& node) const {
  const CudaOp* op = find(node.op);
  return op != nullptr && op->refusal(node, device_).empty();
}

size_t CudaBackend::scratch_bytes(const Node& node) const {
  return find(node.op)->scratch_bytes(node, device_);
}

Buffer CudaBackend::alloc(size_t bytes, Placement) {
  use_device(device_.index);
  return {device_buffer(bytes), bytes};
}

Buffer CudaBackend::alloc_host(size_t bytes) {
  use_device(device_.index);
  return {pinned_buffer(bytes), bytes};
}

void CudaBackend::zero(const Buffer& buffer) {
  use_device(device_.index);
  fill_async(buffer.data.get(), std::byte{0}, buffer.size_bytes, stream_);
  sync_stream(stream_);
}

size_t CudaBackend::free_bytes() const {
  use_device(device_.index);
  return device_memory().free_bytes;
}

// Matrices of rows whose elements lie side by side, one 2-D copy each.
void CudaBackend::copy(const Tensor& dst, const Tensor& src) {
  if (src.shape.n_elems() == 0) return;
  MLA_CHECK_SHAPE(dst.rows_are_contiguous() && src.rows_are_contiguous(), name_, ": copy from ",
                  src.str(), " to ", dst.str(), ": elements must lie side by side");
  use_device(device_.index);
  const auto n_bytes = static_cast<size_t>(row_bytes(src.format, src.shape.extent[3]));
  if (dst.is_contiguous() && src.is_contiguous()) {
    copy_async(dst.data, src.data, static_cast<size_t>(src.span_bytes()), stream_);
    return;
  }
  for (int64_t i0 = 0; i0 < src.shape.extent[0]; ++i0) {
    for (int64_t i1 = 0; i1 < src.shape.extent[1]; ++i1) {
      copy_2d_async(dst.at(i0, i1, 0), static_cast<size_t>(dst.stride[2]), src.at(i0, i1, 0),
                    static_cast<size_t>(src.stride[2]), n_bytes,
                    static_cast<size_t>(src.shape.extent[2]), stream_);
    }
  }
}

Buffer CudaBackend::upload(const Tensor& host) {
  use_device(device_.index);
  const bool packs = traits(host.format).quantized && host.is_contiguous();
  const int64_t n_elems = host.shape.extent[3];
  const int64_t n_rows = n_elems > 0 ? host.shape.n_elems() / n_elems : 0;
  const int64_t bytes = packs ? n_rows * packed_row_bytes(host.format, n_elems) : host.span_bytes();
  Buffer buffer = alloc(static_cast<size_t>(std::max<int64_t>(bytes, 1)), {});
  if (packs) {
    upload_packed(host, buffer.data.get());
  } else {
    staging_->copy(buffer.data.get(), host.data + host.low_bytes(), static_cast<size_t>(bytes));
  }
  sync_stream(stream_);
  return buffer;
}

void CudaBackend::upload_packed(const Tensor& host, std::byte* packed) {
  const int64_t n_elems = host.shape.extent[3];
  const auto unit = static_cast<size_t>(row_bytes(host.format, n_elems));
  const auto packed_unit = static_cast<size_t>(packed_row_bytes(host.format, n_elems));
  if (unit == 0) return;
  const CudaRun run{device_, stream_, nullptr};
  staging_->stream_pieces(host.data, static_cast<size_t>(host.span_bytes()), unit,
                          [&](const std::byte* piece, size_t offset, size_t bytes) {
                            pack_rows(run, host.format, piece, static_cast<int64_t>(bytes / unit),
                                      n_elems, packed + offset / unit * packed_unit);
                          });
}

Tensor CudaBackend::constant_view(const Buffer& uploaded, const Layout& whole, const Layout& view,
                                  int64_t offset_bytes) const {
  if (!traits(whole.format).quantized || !whole.is_contiguous()) {
    return Backend::constant_view(uploaded, whole, view, offset_bytes);
  }
  const int64_t from = row_bytes(whole.format, whole.shape.extent[3]);
  const int64_t to = packed_row_bytes(whole.format, whole.shape.extent[3]);
  if (from == 0) return Tensor(view, uploaded.data.get());
  Tensor packed(view, uploaded.data.get() + offset_bytes / from * to);
  for (size_t i = 0; i + 1 < kMaxRank; ++i) packed.stride[i] = view.stride[i] / from * to;
  packed.stride[kMaxRank - 1] = 0;
  return packed;
}

void CudaBackend::run(std::span<const Step> steps, const Buffer& scratch,
                      const Checkpoint& checkpoint) {
  std::vector<Launch> launches(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) launches[i].step = &steps[i];
  run(launches, scratch, checkpoint);
}

void CudaBackend::run(std::span<const Launch> launches, const Buffer& scratch,
                      const Checkpoint& checkpoint) {
  use_device(device_.index);
  for (const Launch& launch : launches) {
    checkpoint();
    const Step& step = *launch.step;
    if (step.node == nullptr) {
      copy(step.out, step.in[0]);
    } else {
      find(step.node->op)
          ->run(step, {device_, stream_, scratch.data.get(), launch.neighbours, launch.overlap});
    }
  }
}

std::unique_ptr<Program> CudaBackend::compile(std::span<const Step> steps, const Buffer& scratch) {
  const bool only_copies =
      std::ranges::all_of(steps, [](const Step& step) { return step.node == nullptr; });
  if (only_copies) return Backend::compile(steps, scratch);  // a graph costs more than they do
  return std::make_unique<CudaProgram>(*this, steps, scratch);
}

void CudaBackend::sync() {
  use_device(device_.index);
  sync_stream(stream_);
}

bool CudaBackend::reaches(const Backend& other) const {
  const auto* peer = dynamic_cast<const CudaBackend*>(&other);
  return peer != nullptr &&
         (peer->device_.index == device_.index || enable_peer(device_.index, peer->device_.index));
}

std::unique_ptr<Mark> CudaBackend::make_mark() {
  use_device(device_.index);
  return std::make_unique<StreamMark>(device_.index, stream_);
}

void CudaBackend::follow(const Mark& mark) {
  const auto* point = dynamic_cast<const StreamMark*>(&mark);
  if (point == nullptr) return mark.wait();
  use_device(device_.index);
  point->event().wait_in(stream_);
}

}  // namespace mla::cuda
