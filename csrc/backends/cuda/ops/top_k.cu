// The k largest numbers of each row, where they are, and the sum of e^(x - the largest).
//
//   logits [M, V] -> I32 [M, 2 k + 1]: ids, then the bits of the values, falling, ties to the lower
//   id, NaN below -inf; then those of the sum
//
// A number and its place become one integer of 64 bits (base/order.h): all differ, and the largest
// is wanted. A block finds the k largest of a chunk, in no order, by their digits from the top; the
// survivors of all chunks are chunked again, until one chunk is left, which is sorted. A vocabulary
// of 129280 and k = 64 take two launches: 32 chunks, then 2048 survivors. Values are exact.
// The sum is gathered on the way: of each chunk against its own largest number, then of all. Its
// error is that of e^x (2 ulp) and of some 20 additions, each to half an ulp of the sum.
#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/ops/ops.h"
#include "base/order.h"

namespace mla::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kHeld = 8;  // keys of a thread, in registers
constexpr int kChunk = kThreads * kHeld;
// Digits of 11 bits: sign, exponent and two bits of the fraction are the first, which spreads usual
// logits over about 50 counters; 8 bits would crowd them into 5.
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kDigitsPerThread = kDigits / kThreads;

struct Total {  // of e^(x - largest)
  float largest, sum;
};

struct TopK {
  const std::byte* logits;  // of the first pass
  int64_t row_stride, stride;
  const uint64_t* keys;  // [M, n] of later passes
  uint64_t* survivors;   // [M, chunks, k]
  Total* totals;         // [M, first_chunks]: of the first pass
  int32_t* out;          // of the last pass
  int64_t n;             // numbers of a row
  int k, n_chunks, first_chunks;
};

struct Shared {
  int count[kDigits];
  int warp_total[kThreads / kWarpThreads];
  int digit, n_above, n_equal, n_keys, n_out;
  uint64_t best[kMaxTopK];
  float warps[kWarpThreads];
};

__device__ uint64_t key_at(const TopK& t, int64_t row, int64_t i) {
  if (i >= t.n) return 0;
  if (t.keys != nullptr) return t.keys[row * t.n + i];
  const float value = load_element(t.logits + row * t.row_stride + i * t.stride, Format::F32);
  return choice_key(value, static_cast<uint32_t>(i));
}

// With count[] full: finds the digit whose keys, with all of higher digits, are the first to reach
// `wanted`; n_above is how many are higher, n_equal how many have it.
__device__ void find_digit(Shared& s, int wanted) {
  const int first = kDigits - 1 - static_cast<int>(threadIdx.x) * kDigitsPerThread;  // falling
  int own = 0;
#pragma unroll
  for (int i = 0; i < kDigitsPerThread; ++i) own += s.count[first - i];
  int through = own;  // of this and all lower threads: a prefix sum
  for (int step = 1; step < kWarpThreads; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, through, step);
    if (lane_id() >= step) through += before;
  }
  if (lane_id() == kWarpThreads - 1) s.warp_total[warp_id()] = through;
  __syncthreads();
  for (int warp = 0; warp < warp_id(); ++warp) through += s.warp_total[warp];
  int above = through - own;
  if (above < wanted && through >= wanted) {  // one thread
    int digit = first;
    while (above + s.count[digit] < wanted) above += s.count[digit--];
    s.digit = digit;
    s.n_above = above;
    s.n_equal = s.count[digit];
  }
  __syncthreads();
}

// The smallest prefix, shifted down by `shift`, that exactly `k` of the block's keys reach.
struct Threshold {
  uint64_t prefix;
  int shift;
};
__device__ Threshold find_threshold(Shared& s, const uint64_t (&keys)[kHeld], int k) {
  Threshold t = {0, 64};  // of no bits yet: all keys have it
  int wanted = k;
  for (;;) {
    const int bits = t.shift < kDigitBits ? t.shift : kDigitBits;
    const int shift = t.shift - bits;
    for (int i = threadIdx.x; i < kDigits; i += kThreads) s.count[i] = 0;
    __syncthreads();
#pragma unroll
    for (uint64_t key : keys) {
      const bool matches = t.shift == 64 || key >> t.shift == t.prefix;
      if (key != 0 && matches) atomicAdd(&s.count[key >> shift & ((1u << bits) - 1)], 1);
    }
    __syncthreads();
    find_digit(s, wanted);
    t = {t.prefix << bits | static_cast<unsigned>(s.digit), shift};
    wanted -= s.n_above;
    if (s.n_equal == wanted || shift == 0) return t;
  }
}

// Leaves the k largest in s.best, in no order; absent ones are 0.
__device__ void select(Shared& s, const uint64_t (&keys)[kHeld], int k) {
  if (threadIdx.x == 0) s.n_keys = s.n_out = 0;
  for (int i = threadIdx.x; i < k; i += kThreads) s.best[i] = 0;
  __syncthreads();
  int n_keys = 0;
#pragma unroll
  for (uint64_t key : keys) n_keys += key != 0;
  n_keys = warp_sum(n_keys);
  if (lane_id() == 0) atomicAdd(&s.n_keys, n_keys);
  __syncthreads();
  const Threshold t = s.n_keys > k ? find_threshold(s, keys, k) : Threshold{0, 0};
#pragma unroll
  for (uint64_t key : keys) {
    if (key != 0 && key >> t.shift >= t.prefix) s.best[atomicAdd(&s.n_out, 1)] = key;
  }
  __syncthreads();
}

__device__ float value_of(uint64_t key) { return order_value(static_cast<uint32_t>(key >> 32)); }

// Of the block's numbers, the same in every thread.
__device__ Total total_of(Shared& s, const uint64_t (&keys)[kHeld]) {
  float largest = -INFINITY;
#pragma unroll
  for (uint64_t key : keys) {
    if (key != 0) largest = fmaxf(largest, value_of(key));
  }
  largest = block_max(largest, s.warps);
  const float shift = largest == -INFINITY ? 0.0f : largest;
  float sum = 0;
#pragma unroll
  for (uint64_t key : keys) {
    if (key != 0) sum += expf(value_of(key) - shift);
  }
  return {largest, block_sum(sum, s.warps)};
}

// Of the whole row.
__device__ Total joined(const TopK& t, Shared& s, int64_t row) {
  float largest = -INFINITY;
  for (int i = threadIdx.x; i < t.first_chunks; i += kThreads) {
    largest = fmaxf(largest, t.totals[row * t.first_chunks + i].largest);
  }
  largest = block_max(largest, s.warps);
  float sum = 0;
  for (int i = threadIdx.x; i < t.first_chunks; i += kThreads) {
    const Total part = t.totals[row * t.first_chunks + i];
    sum += part.sum * expf(part.largest - largest);
  }
  return {largest, block_sum(sum, s.warps)};
}

// Each of the k keys goes to its rank.
__device__ void write_sorted(const TopK& t, const Shared& s, int64_t row, Total total) {
  int32_t* ids = t.out + row * (2 * t.k + 1);
  auto* values = reinterpret_cast<float*>(ids + t.k);
  // e^0 = 1, but NaN where the largest is infinite.
  if (threadIdx.x == 0) values[t.k] = total.sum * expf(total.largest - total.largest);
  if (static_cast<int>(threadIdx.x) >= t.k) return;
  const uint64_t key = s.best[threadIdx.x];
  int rank = 0;
  for (int i = 0; i < t.k; ++i) rank += s.best[i] > key;
  const uint32_t id = chosen_id(key);
  ids[rank] = static_cast<int32_t>(id);
  values[rank] = load_element(t.logits + row * t.row_stride + id * t.stride, Format::F32);
}

__global__ void __launch_bounds__(kThreads) top_k_kernel(TopK t) {
  __shared__ Shared s;
  pdl_wait();
  const int64_t row = blockIdx.x / t.n_chunks;
  const int64_t chunk = blockIdx.x - row * t.n_chunks;
  uint64_t keys[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    keys[i] = key_at(t, row, chunk * kChunk + i * kThreads + threadIdx.x);
  }
  const bool is_first = t.keys == nullptr;
  const Total total = is_first ? total_of(s, keys) : Total{0, 0};
  select(s, keys, t.k);
  if (t.n_chunks == 1) {
    write_sorted(t, s, row, is_first ? total : joined(t, s, row));
    return;
  }
  if (is_first && threadIdx.x == 0) t.totals[row * t.n_chunks + chunk] = total;
  uint64_t* survivors = t.survivors + (row * t.n_chunks + chunk) * t.k;
  for (int i = threadIdx.x; i < t.k; i += kThreads) survivors[i] = s.best[i];
}

int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

size_t survivor_bytes(int64_t rows, int64_t n, int k) {
  const auto bytes = static_cast<size_t>(rows * chunks_of(n) * k) * sizeof(uint64_t);
  return (bytes + 255) / 256 * 256;
}

size_t total_bytes(int64_t rows, int64_t n) {
  const auto bytes = static_cast<size_t>(rows * chunks_of(n)) * sizeof(Total);
  return (bytes + 255) / 256 * 256;
}

// Totals of the chunks; survivors of the first pass, and those of the second; later passes take
// turns.
size_t scratch_bytes(const Node& node, const DeviceInfo&) {
  const Node& logits = *node.input(0);
  const int k = node.attr<TopKAttrs>().k;
  return total_bytes(logits.dim(0), logits.dim(1)) +
         survivor_bytes(logits.dim(0), logits.dim(1), k) +
         survivor_bytes(logits.dim(0), chunks_of(logits.dim(1)) * k, k);
}

void run_top_k(const Step& step, const CudaRun& run) {
  const Tensor& logits = step.in[0];
  const int64_t n_rows = logits.shape.extent[2];
  TopK t = {};
  t.logits = logits.data;
  t.row_stride = logits.stride[2];
  t.stride = logits.stride[3];
  t.out = step.out.ptr<int32_t>();
  t.n = logits.shape.extent[3];
  t.k = step.node->attr<TopKAttrs>().k;
  t.first_chunks = static_cast<int>(chunks_of(t.n));
  t.totals = reinterpret_cast<Total*>(run.scratch);
  std::byte* room = run.scratch + total_bytes(n_rows, t.n);
  auto* here = reinterpret_cast<uint64_t*>(room);
  auto* there = reinterpret_cast<uint64_t*>(room + survivor_bytes(n_rows, t.n, t.k));
  for (;;) {
    t.n_chunks = static_cast<int>(chunks_of(t.n));
    t.survivors = here;
    launch(run, top_k_kernel, dim3(static_cast<unsigned>(n_rows * t.n_chunks)), dim3(kThreads), 0,
           t);
    if (t.n_chunks == 1) return;
    t.keys = here;
    t.n = int64_t{t.n_chunks} * t.k;
    std::swap(here, there);
  }
}

}  // namespace

const CudaOp top_k_op = {never_refused, scratch_bytes, run_top_k};

}  // namespace mla::cuda
