// The runtime: blocks, kernels, recorded graphs and copies come after one another as they must. The
// same program runs on a device and emulated. Exit status 0: all good.
#include "intrinsics_cases.h"

namespace mla::cuda::test {
namespace {

// counters: sum, max, min, exchange's or, tickets. The block that comes last adds all up.
__global__ void meet(const int* in, int* counters, int* total) {
  pdl_wait();
  const int x = in[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(counters, x);
  atomicMax(counters + 1, x);
  atomicMin(counters + 2, x);
  atomicOr(counters + 3, 1 << (x & 15));
  __shared__ unsigned ticket;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    ticket = atomicInc(reinterpret_cast<unsigned*>(counters + 4), gridDim.x - 1);
  }
  __syncthreads();
  if (ticket == gridDim.x - 1 && threadIdx.x == 0) {
    *total = load_coherent(counters) + load_coherent(counters + 1);
  }
}

void test_atomics(Test& t) {
  std::vector<int> x(8 * 64);
  for (int& v : x) v = t.integer(-999, 999);
  int sum = 0, bits = 0;
  for (const int v : x) sum += v, bits |= 1 << (v & 15);
  const int largest = *std::max_element(x.begin(), x.end());
  const int smallest = *std::min_element(x.begin(), x.end());
  const OnDevice<int> in(t, x), counters(t, {0, -5000, 5000, 0, 0}), total(t, {0});
  launch(t.run(), meet, 8, 64, 0, in.get(), counters.get(), total.get());
  t.compare("atomics", counters.host(), {sum, largest, smallest, bits, 0});
  t.compare("the last block", total.host(), {sum + largest});
}

__global__ void neighbours(const int* in, int* out, int n) {
  pdl_wait();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = (load_coherent(in + i) + 3 * load_coherent(in + (i + 1) % n)) % 10007;
}

std::vector<int> after_rounds(std::vector<int> x, int n_rounds) {
  for (int round = 0; round < n_rounds; ++round) {
    std::vector<int> next(x.size());
    for (size_t i = 0; i < x.size(); ++i) next[i] = (x[i] + 3 * x[(i + 1) % x.size()]) % 10007;
    x = next;
  }
  return x;
}

void enqueue_rounds(Test& t, int* a, int* b, int n, int n_rounds) {
  for (int round = 0; round < n_rounds; round += 2) {
    launch(t.run(), neighbours, static_cast<unsigned>((n + 63) / 64), 64, 0, a, b, n);
    launch(t.run(), neighbours, static_cast<unsigned>((n + 63) / 64), 64, 0, b, a, n);
  }
}

void test_order(Test& t) {
  constexpr int kCount = 5000, kRounds = 40;
  std::vector<int> x(kCount);
  for (int& v : x) v = t.integer(0, 10006);
  const OnDevice<int> a(t, x), b(t, std::vector<int>(kCount));
  enqueue_rounds(t, a.get(), b.get(), kCount, kRounds);
  const std::vector<int> expected = after_rounds(x, kRounds);
  t.compare("kernels one after another", a.host(), expected);

  begin_recording(t.stream());
  enqueue_rounds(t, a.get(), b.get(), kCount, kRounds);
  const RecordedGraph graph = end_recording(t.stream());
  t.compare("recording runs nothing", a.host(), expected);
  graph.launch(t.stream());
  graph.launch(t.stream());
  t.compare("a recorded graph, twice", a.host(), after_rounds(expected, 2 * kRounds));

  begin_recording(t.stream());
  enqueue_rounds(t, a.get(), b.get(), kCount, 2);
  abandon_recording(t.stream());
  t.compare("an abandoned recording", a.host(), after_rounds(expected, 2 * kRounds));
}

void test_memory(Test& t) {
  const DeviceMemory before = device_memory();
  t.expect_error<MemoryLimitError>("more memory than there is", "is out of memory",
                                   [&] { (void)alloc_device(before.total_bytes * 2); });
  std::vector<int> x(6 * 8);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<int>(i);
  const OnDevice<int> in(t, x), out(t, std::vector<int>(4 * 3, -1));
  copy_2d_async(out.get(), 12, in.get() + 2, 32, 8, 4, t.stream());
  t.compare("rows copied", out.host(), {2, 3, -1, 10, 11, -1, 18, 19, -1, 26, 27, -1});
  fill_async(out.get(), std::byte{1}, 8, t.stream());
  t.compare("filled", out.host(), {0x01010101, 0x01010101, -1, 10, 11, -1, 18, 19, -1, 26, 27, -1});
  Event start, end;
  start.record(t.stream());
  end.record(t.stream());
  end.sync();
  t.report("events", end.done() && end.since_ms(start) >= 0.0f, "");
}

}  // namespace
}  // namespace mla::cuda::test

int main() {
  using namespace mla::cuda::test;
  Test t;
  test_atomics(t);
  test_order(t);
  test_memory(t);
  return t.n_failed() == 0 ? 0 : 1;
}
