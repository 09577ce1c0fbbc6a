// The device's intrinsics and the runtime against plain loops. The same program runs on a device
// and emulated: what the emulator takes the hardware to do is shown by both passing. Inputs are
// small integers, so that results are equal to the last bit. Exit status 0: all good.
#include "intrinsics_cases.h"

namespace mla::cuda::test {
namespace {

// ---- matrices -----------------------------------------------------------------------------------

template <class Element>
__device__ uint32_t pair_of(const Element* matrix, int first, int second) {
  uint16_t low, high;
  memcpy(&low, matrix + first, 2);
  memcpy(&high, matrix + second, 2);
  return low | static_cast<uint32_t>(high) << 16;
}

// Each warp: d [16][8] += a [16][16] b [16][8], fragments as intrinsics.cuh draws them.
template <class Element>
__global__ void mma_by_hand(const Element* a, const Element* b, float* d) {
  pdl_wait();
  a += warp_id() * 256, b += warp_id() * 128, d += warp_id() * 128;
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t fa[4], fb[2];
  float fd[4];
  for (int i = 0; i < 4; ++i) {
    const int at = (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    fa[i] = pair_of(a, at, at + 1);
    fd[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  }
  for (int i = 0; i < 2; ++i) {
    const int k = 2 * t + 8 * i;
    fb[i] = pair_of(b, k * 8 + g, (k + 1) * 8 + g);
  }
  if constexpr (sizeof(Element) == 2 && std::is_same_v<Element, __half>) {
    mma_f16(fd, fa, fb);
  } else {
    mma_bf16(fd, fa, fb);
  }
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fd[i];
}

template <class Element>
void test_mma(Test& t, const char* name) {
  constexpr int kWarps = 3;
  std::vector<Element> a(kWarps * 256), b(kWarps * 128);
  std::vector<float> d(kWarps * 128), expected;
  for (Element& x : a) x = Element(static_cast<float>(t.integer(-40, 40)));
  for (Element& x : b) x = Element(static_cast<float>(t.integer(-40, 40)));
  for (float& x : d) x = static_cast<float>(t.integer(-1000, 1000));
  expected = d;
  for (int w = 0; w < kWarps; ++w) {
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        for (int k = 0; k < 16; ++k) {
          expected[static_cast<size_t>(w * 128 + m * 8 + n)] +=
              static_cast<float>(a[static_cast<size_t>(w * 256 + m * 16 + k)]) *
              static_cast<float>(b[static_cast<size_t>(w * 128 + k * 8 + n)]);
        }
      }
    }
  }
  const OnDevice<Element> da(t, a), db(t, b);
  const OnDevice<float> dd(t, d);
  launch(t.run(), mma_by_hand<Element>, 1, kWarps * 32, 0, da.get(), db.get(), dd.get());
  t.compare(name, dd.host(), expected);
}

__global__ void load_all(const uint16_t* matrices, uint32_t* out) {
  pdl_wait();
  __shared__ __align__(16) uint16_t smem[4][8][8];
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32) (&smem[0][0][0])[i] = matrices[i];
  __syncwarp();
  const int lane = lane_id();
  uint32_t four[4], two[2];
  ldmatrix_x4(four, smem[lane / 8][lane % 8]);
  for (int i = 0; i < 4; ++i) out[i * 32 + lane] = four[i];
  ldmatrix_x4_trans(four, smem[lane / 8][lane % 8]);
  for (int i = 0; i < 4; ++i) out[(4 + i) * 32 + lane] = four[i];
  ldmatrix_x2(two, smem[1 + lane / 8 % 2][lane % 8]);
  for (int i = 0; i < 2; ++i) out[(8 + i) * 32 + lane] = two[i];
  ldmatrix_x2_trans(two, smem[1 + lane / 8 % 2][lane % 8]);
  for (int i = 0; i < 2; ++i) out[(10 + i) * 32 + lane] = two[i];
}

void test_ldmatrix(Test& t) {
  std::vector<uint16_t> m(256);
  for (uint16_t& x : m) x = static_cast<uint16_t>(t.integer(0, 65535));
  std::vector<uint32_t> expected;
  for (int which = 0; which < 12; ++which) {
    const int matrix = which < 8 ? which % 4 : 1 + which % 2;
    const bool transposed = which < 8 ? which >= 4 : which >= 10;
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, c = lane % 4 * 2;
      const int low = transposed ? c * 8 + g : g * 8 + c;
      const int high = transposed ? (c + 1) * 8 + g : g * 8 + c + 1;
      expected.push_back(m[static_cast<size_t>(matrix * 64 + low)] |
                         static_cast<uint32_t>(m[static_cast<size_t>(matrix * 64 + high)]) << 16);
    }
  }
  const OnDevice<uint16_t> dm(t, m);
  const OnDevice<uint32_t> out(t, std::vector<uint32_t>(12 * 32));
  launch(t.run(), load_all, 1, 32, 0, dm.get(), out.get());
  t.compare("ldmatrix", out.host(), expected);
}

// ---- warps --------------------------------------------------------------------------------------

constexpr int kWarpResults = 22;

__global__ void warp_functions(const int* in, int* out) {
  pdl_wait();
  const int lane = lane_id(), x = in[threadIdx.x];
  int* o = out + threadIdx.x * kWarpResults;
  o[0] = __shfl_sync(kAllLanes, x, (lane * 7 + 3) % 32);
  o[1] = __shfl_sync(kAllLanes, x, lane % 5, 8);
  o[2] = __shfl_xor_sync(kAllLanes, x, 9);
  o[3] = __shfl_xor_sync(kAllLanes, x, 3, 4);
  o[4] = __shfl_up_sync(kAllLanes, x, 5);
  o[5] = __shfl_up_sync(kAllLanes, x, 3, 16);
  o[6] = __shfl_down_sync(kAllLanes, x, 6);
  o[7] = __shfl_down_sync(kAllLanes, x, 1, 2);
  o[8] = static_cast<int>(__shfl_xor_sync(kAllLanes, static_cast<double>(x), 16) * 2.0);
  o[9] = static_cast<int>(__ballot_sync(kAllLanes, x % 3 == 0));
  o[10] = __any_sync(kAllLanes, x > 98);
  o[11] = __all_sync(kAllLanes, x < 99);
  o[12] = static_cast<int>(__match_any_sync(kAllLanes, x % 4));
  o[13] = static_cast<int>(warp_sum(static_cast<float>(x)));
  o[14] = static_cast<int>(warp_max(static_cast<float>(x)));
  o[15] = warp_sum(x);
  // Halves of the warp part, meet among themselves, and join.
  const unsigned mine = lane < 11 ? 0x7ffu : ~0x7ffu;
  if (lane < 11) {
    o[16] = __shfl_xor_sync(mine, x, 1) * (lane < 10 ? 1 : 0);
  } else {
    o[16] = __shfl_sync(mine, x, 11 + lane % 3);
  }
  o[17] = static_cast<int>(__ballot_sync(mine, x % 2));
  __syncwarp();
#if MLA_CUDA_ARCH >= 800
  o[18] = __reduce_add_sync(mine, x);
  o[19] = __reduce_max_sync(kAllLanes, x);
  o[20] = __reduce_min_sync(mine, x);
#else
  o[18] = o[19] = o[20] = 0;
#endif
  o[21] = static_cast<int>(warp_max(static_cast<uint32_t>(x + 100)));
}

// What lane `lane` of x should see.
std::vector<int> warp_expectation(const int* x, int lane, bool reduces) {
  const auto count = [&](auto f, int from = 0, int to = 32) {
    int total = 0;
    for (int i = from; i < to; ++i) total += f(i);
    return total;
  };
  const auto bits = [&](auto f, int from = 0, int to = 32) {
    unsigned all = 0;
    for (int i = from; i < to; ++i) all |= f(i) ? 1u << i : 0u;
    return static_cast<int>(all);
  };
  const int from = lane < 11 ? 0 : 11, to = lane < 11 ? 11 : 32;
  const int largest = *std::max_element(x, x + 32);
  const int sum = count([&](int i) { return x[i]; });
  return {x[(lane * 7 + 3) % 32],
          x[lane / 8 * 8 + lane % 5 % 8],
          x[lane ^ 9],
          x[lane ^ 3],
          x[lane >= 5 ? lane - 5 : lane],
          x[lane % 16 >= 3 ? lane - 3 : lane],
          x[lane < 26 ? lane + 6 : lane],
          x[lane % 2 == 0 ? lane + 1 : lane],
          2 * x[lane ^ 16],
          bits([&](int i) { return x[i] % 3 == 0; }),
          largest > 98,
          largest < 99,
          bits([&](int i) { return x[i] % 4 == x[lane] % 4; }),
          sum,
          largest,
          sum,
          lane < 10    ? x[lane ^ 1]
          : lane == 10 ? 0
                       : x[11 + lane % 3],
          bits([&](int i) { return x[i] % 2 != 0; }, from, to),
          reduces ? count([&](int i) { return x[i]; }, from, to) : 0,
          reduces ? largest : 0,
          reduces ? *std::min_element(x + from, x + to) : 0,
          largest + 100};
}

void test_warps(Test& t) {
  std::vector<int> x(96), expected;
  for (int& v : x) v = t.integer(-99, 99);
  for (int i = 0; i < 96; ++i) {
    for (const int v : warp_expectation(x.data() + i / 32 * 32, i % 32, t.capability() >= 80)) {
      expected.push_back(v);
    }
  }
  const OnDevice<int> in(t, x), out(t, std::vector<int>(96 * kWarpResults));
  launch(t.run(), warp_functions, 1, 96, 0, in.get(), out.get());
  t.compare("warp functions", out.host(), expected);
}

// ---- blocks -------------------------------------------------------------------------------------

// Two warps fill, two empty, through a ring of two places: named barriers 1 + place (full) and 3 +
// place (empty).
__global__ void ring(const int* in, int* out, int n_rounds) {
  pdl_wait();
  __shared__ int places[2][64];
  const bool fills = threadIdx.x < 64;
  const int at = static_cast<int>(threadIdx.x) % 64;
  for (int round = 0; round < n_rounds; ++round) {
    const int place = round % 2;
    if (fills) {
      if (round >= 2) bar_sync(3 + place, 128);
      places[place][at] = in[round * 64 + at];
      __threadfence_block();
      bar_arrive(1 + place, 128);
    } else {
      bar_sync(1 + place, 128);
      out[round * 64 + at] = 2 * places[place][63 - at];
      if (round + 2 < n_rounds) bar_arrive(3 + place, 128);
    }
  }
}

void test_barriers(Test& t) {
  constexpr int kRounds = 9;
  std::vector<int> x(kRounds * 64), expected;
  for (int& v : x) v = t.integer(-99, 99);
  for (int i = 0; i < kRounds * 64; ++i) {
    expected.push_back(2 * x[static_cast<size_t>(i / 64 * 64 + 63 - i % 64)]);
  }
  const OnDevice<int> in(t, x), out(t, std::vector<int>(x.size()));
  launch(t.run(), ring, 1, 128, 0, in.get(), out.get(), kRounds);
  t.compare("named barriers", out.host(), expected);
}

__global__ void __launch_bounds__(1024) reduce_block(const float* in, float* out) {
  pdl_wait();
  __shared__ float smem[32];
  const float x = in[blockIdx.x * blockDim.x + threadIdx.x];
  const float sum = block_sum(x, smem), largest = block_max(x, smem);
  const int n_odd = __syncthreads_count(static_cast<int>(x) % 2 != 0);
  const int any = __syncthreads_or(x > 98.0f), all = __syncthreads_and(x < 99.0f);
  float* o = out + 5 * (blockIdx.x * blockDim.x + threadIdx.x);
  o[0] = sum, o[1] = largest, o[2] = static_cast<float>(n_odd);
  o[3] = static_cast<float>(any), o[4] = static_cast<float>(all);
}

void test_block_reductions(Test& t) {
  for (const int n : {32, 96, 1024}) {
    std::vector<float> x(static_cast<size_t>(2 * n)), expected;
    for (float& v : x) v = static_cast<float>(t.integer(-99, 99));
    for (int block = 0; block < 2; ++block) {
      const float* b = x.data() + block * n;
      float sum = 0, largest = b[0], n_odd = 0;
      for (int i = 0; i < n; ++i) {
        sum += b[i], largest = std::max(largest, b[i]);
        n_odd += static_cast<int>(b[i]) % 2 != 0 ? 1.0f : 0.0f;
      }
      for (int i = 0; i < n; ++i) {
        for (const float v :
             {sum, largest, n_odd, largest > 98 ? 1.0f : 0.0f, largest < 99 ? 1.0f : 0.0f}) {
          expected.push_back(v);
        }
      }
    }
    const OnDevice<float> in(t, x), out(t, std::vector<float>(x.size() * 5));
    launch(t.run(), reduce_block, 2, static_cast<unsigned>(n), 0, in.get(), out.get());
    t.compare("reductions of " + std::to_string(n) + " threads", out.host(), expected);
  }
}

// Places are filled three rounds ahead, in pieces of 16, 8 and 4 bytes; every fifth row is absent.
__global__ void copy_ahead(const uint32_t* in, uint32_t* out, int n_rows) {
  constexpr int kPlaces = 4;
  auto* smem = dynamic_smem<uint32_t>();  // [kPlaces][1024]
  pdl_wait();
  const int t = static_cast<int>(threadIdx.x);
  const auto start = [&](int row) {
    if (row < n_rows) {
      uint32_t* to = smem + row % kPlaces * 1024;
      const uint32_t* from = in + row * 1024;
      const bool valid = row % 5 != 4;
      cp_async16(to + 4 * t, from + 4 * t, valid);
      cp_async8(to + 512 + 2 * t, from + 512 + 2 * t, valid);
      cp_async4(to + 768 + t, from + 768 + t, valid);
      cp_async4(to + 896 + t, from + 896 + t, valid);
    }
    cp_async_commit();
  };
  for (int row = 0; row < kPlaces - 1; ++row) start(row);
  for (int row = 0; row < n_rows; ++row) {
    cp_async_wait<kPlaces - 2>();
    __syncthreads();
    start(row + kPlaces - 1);
    for (int i = t; i < 1024; i += 128) {
      out[row * 1024 + i] = smem[row % kPlaces * 1024 + 1023 - i] + 1;
    }
  }
}

void test_copies(Test& t) {
  constexpr int kRows = 11;
  std::vector<uint32_t> x(kRows * 1024), expected(x.size());
  for (uint32_t& v : x) v = static_cast<uint32_t>(t.integer(0, 1 << 30));
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t row = i / 1024;
    expected[i] = row % 5 == 4 ? 1 : x[row * 1024 + 1023 - i % 1024] + 1;
  }
  const OnDevice<uint32_t> in(t, x), out(t, std::vector<uint32_t>(x.size()));
  // More than a block has without asking.
  const size_t bytes = t.capability() >= 80 ? 96 * 1024 : 60 * 1024;
  launch(t.run(), copy_ahead, 1, 128, bytes, in.get(), out.get(), kRows);
  t.compare("cp_async", out.host(), expected);
}

// ---- arithmetic ---------------------------------------------------------------------------------

constexpr int kWordResults = 12;

__global__ void word_functions(const uint32_t* in, uint32_t* out, int n) {
  pdl_wait();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const uint32_t x = in[3 * i], y = in[3 * i + 1], z = in[3 * i + 2];
  uint32_t* o = out + kWordResults * i;
  o[0] = static_cast<uint32_t>(dp4a(static_cast<int>(x), static_cast<int>(y), static_cast<int>(z)));
  o[1] = __byte_perm(x, y, z & 0xffffu);
  o[2] = __funnelshift_l(x, y, z);
  o[3] = __funnelshift_r(x, y, z);
  o[4] = static_cast<uint32_t>(__popc(x)) + 100 * static_cast<uint32_t>(__clz(static_cast<int>(x)));
  o[5] = static_cast<uint32_t>(__ffs(static_cast<int>(y)));
  o[6] = __brev(x);
  o[7] = __umulhi(x, y);
  o[8] = __vadd4(x, y);
  o[9] = __vsub4(x, y);
  o[10] = static_cast<uint32_t>(__float2int_rn(__uint_as_float((x & 0x007fffffu) | 0x47800000u)));
  o[11] = min(x, y) ^ max(y, z);
}

std::vector<uint32_t> word_expectation(uint32_t x, uint32_t y, uint32_t z) {
  const uint64_t yx = uint64_t{y} << 32 | x;
  uint32_t dot = z, permuted = 0, reversed = 0, sum = 0, difference = 0;
  for (int i = 0; i < 4; ++i) {
    const auto byte = [&](uint32_t word) { return word >> (8 * i) & 0xffu; };
    dot += static_cast<uint32_t>(static_cast<int8_t>(byte(x)) * static_cast<int8_t>(byte(y)));
    const uint32_t nibble = z >> (4 * i) & 15u;
    auto chosen = static_cast<uint32_t>(yx >> (8 * (nibble & 7u)) & 0xffu);
    if (nibble >= 8) chosen = chosen >= 128 ? 255 : 0;
    permuted |= chosen << (8 * i);
    sum |= ((byte(x) + byte(y)) & 0xffu) << (8 * i);
    difference |= ((byte(x) - byte(y)) & 0xffu) << (8 * i);
  }
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  uint32_t ones = 0, leading = 0, first = 0;
  for (int i = 0; i < 32; ++i) ones += x >> i & 1u;
  while (leading < 32 && (x >> (31 - leading) & 1u) == 0) ++leading;
  while (first < 32 && (y >> first & 1u) == 0) ++first;
  const uint32_t shift = z & 31u;
  const float number = std::bit_cast<float>((x & 0x007fffffu) | 0x47800000u);
  return {dot,
          permuted,
          static_cast<uint32_t>((yx << shift) >> 32),
          static_cast<uint32_t>(yx >> shift),
          ones + 100 * leading,
          first < 32 ? first + 1 : 0,
          reversed,
          static_cast<uint32_t>((uint64_t{x} * y) >> 32),
          sum,
          difference,
          static_cast<uint32_t>(std::lrint(number)),
          std::min(x, y) ^ std::max(y, z)};
}

void test_words(Test& t) {
  constexpr int kCount = 500;
  std::vector<uint32_t> x(3 * kCount), expected;
  for (uint32_t& v : x) v = static_cast<uint32_t>(t.integer(-(1 << 30), 1 << 30)) * 3u;
  for (size_t i = 0; i < kCount; ++i) {
    for (const uint32_t v : word_expectation(x[3 * i], x[3 * i + 1], x[3 * i + 2])) {
      expected.push_back(v);
    }
  }
  const OnDevice<uint32_t> in(t, x), out(t, std::vector<uint32_t>(kCount * kWordResults));
  launch(t.run(), word_functions, 4, 128, 0, in.get(), out.get(), kCount);
  t.compare("functions of words", out.host(), expected);
}

__global__ void convert(const float* in, float* out, int n) {
  pdl_wait();
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    out[3 * i] = __half2float(__float2half_rn(in[i]));
    out[3 * i + 1] = __bfloat162float(__float2bfloat16_rn(in[i]));
    const __half2 x = __floats2half2_rn(in[i], 3.0f);
    out[3 * i + 2] = __low2float(__hfma2(x, x, x)) + 0.0f;
  }
}

void test_halves(Test& t) {
  std::vector<float> x, expected;
  for (int i = 0; i < 3000; ++i) {
    const int exponent = t.integer(-26, 17);
    x.push_back(std::ldexp(static_cast<float>(t.integer(-(1 << 20), 1 << 20)), exponent - 20));
  }
  for (const float v : x) {
    const float half = half_to_float(float_to_half(v));
    expected.push_back(half);
    expected.push_back(bf16_to_float(float_to_bf16(v)));
    expected.push_back(half_to_float(float_to_half(half * half + half)) + 0.0f);
  }
  const OnDevice<float> in(t, x), out(t, std::vector<float>(3 * x.size()));
  launch(t.run(), convert, 1, 128, 0, in.get(), out.get(), static_cast<int>(x.size()));
  t.compare("halves", out.host(), expected);
}

__global__ void powers(const float* in, float* out) {
  pdl_wait();
  out[threadIdx.x] = exp2_approx(in[threadIdx.x]);
}

void test_exp2(Test& t) {
  std::vector<float> x(256);
  for (float& v : x) v = static_cast<float>(t.integer(-120000, 120000)) * 1e-3f;
  const OnDevice<float> in(t, x), out(t, std::vector<float>(256));
  launch(t.run(), powers, 1, 256, 0, in.get(), out.get());
  double worst = 0;
  const std::vector<float> got = out.host();
  for (size_t i = 0; i < 256; ++i) {
    const double expected = std::exp2(static_cast<double>(x[i]));
    worst = std::max(worst, std::abs(static_cast<double>(got[i]) - expected) / expected);
  }
  t.report("exp2_approx", worst < 4e-7, std::to_string(worst));
}

}  // namespace

void test_all(Test& t) {
  test_mma<__half>(t, "mma_f16");
  test_mma<__nv_bfloat16>(t, "mma_bf16");
  test_ldmatrix(t);
  test_warps(t);
  test_barriers(t);
  test_block_reductions(t);
  test_copies(t);
  test_words(t);
  test_halves(t);
  test_exp2(t);
}

}  // namespace mla::cuda::test

int main() {
  mla::cuda::test::Test t;
  mla::cuda::test::test_all(t);
#ifdef MLA_CUDA_EMULATE
  setenv("MLA_EMULATOR_ORDER", "reverse", 1);
  mla::cuda::test::test_all(t);
  mla::cuda::test::test_checks(t);
#endif
  return t.n_failed() == 0 ? 0 : 1;
}
