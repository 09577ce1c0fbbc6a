// What test_intrinsics.cu and test_runtime.cu compare with, and how they report.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "backends/cuda/kernels/intrinsics.cuh"
#include "backends/cuda/runtime.h"
#include "base/error.h"
#include "base/half.h"

namespace mla::cuda::test {

class Test {
 public:
  Test() : device_(device_info(0)) {
    use_device(0);
    stream_ = create_stream();
    std::printf("%s, compute capability %d.%d, driver %d, runtime %d\n", device_.name.c_str(),
                device_.major, device_.minor, driver_version(), runtime_version());
  }
  ~Test() { destroy_stream(stream_); }
  Test(const Test&) = delete;
  Test& operator=(const Test&) = delete;

  CudaRun run() const { return {device_, stream_, nullptr}; }
  Stream stream() const { return stream_; }
  int capability() const { return device_.capability(); }
  int n_failed() const { return n_failed_; }
  int integer(int from, int to) { return std::uniform_int_distribution<int>(from, to)(random_); }

  void report(const std::string& name, bool good, const std::string& what) {
    std::printf("%s  %s%s%s\n", good ? "ok  " : "FAIL", name.c_str(), good ? "" : ": ",
                good ? "" : what.c_str());
    std::fflush(stdout);
    if (!good) ++n_failed_;
  }

  template <class T>
  void compare(const std::string& name, const std::vector<T>& got, const std::vector<T>& expected) {
    if (got.size() != expected.size()) return report(name, false, "another number of results");
    for (size_t i = 0; i < got.size(); ++i) {
      const bool both_nan = got[i] != got[i] && expected[i] != expected[i];
      if (got[i] != expected[i] && !both_nan) {
        return report(name, false, concat("result ", i, " is ", got[i], ", not ", expected[i]));
      }
    }
    report(name, true, "");
  }

  template <class ErrorType, class F>
  void expect_error(const std::string& name, const std::string& text, F f) {
    try {
      f();
    } catch (const ErrorType& error) {
      const bool good = std::string(error.what()).find(text) != std::string::npos;
      return report(name, good, error.what());
    }
    report(name, false, "no error");
  }

 private:
  DeviceInfo device_;
  Stream stream_ = nullptr;
  std::mt19937 random_{20};
  int n_failed_ = 0;
};

template <class T>
class OnDevice {
 public:
  OnDevice(const Test& t, const std::vector<T>& host)
      : stream_(t.stream()), n_(host.size()), data_(device_buffer(n_ * sizeof(T))) {
    copy_async(get(), host.data(), n_ * sizeof(T), stream_);
    sync_stream(stream_);
  }
  T* get() const { return reinterpret_cast<T*>(data_.get()); }
  std::vector<T> host() const {
    std::vector<T> out(n_);
    copy_async(out.data(), get(), n_ * sizeof(T), stream_);
    sync_stream(stream_);
    return out;
  }

 private:
  Stream stream_;
  size_t n_;
  std::shared_ptr<std::byte> data_;
};

#ifdef MLA_CUDA_EMULATE

// ---- what the emulator must find ----------------------------------------------------------------

inline __global__ void without_wait(int* out) { out[threadIdx.x] = 1; }
inline __global__ void one_missing(int* out) {
  pdl_wait();
  if (threadIdx.x != 40) bar_sync(1, 64);
  out[threadIdx.x] = 1;
}
inline __global__ void split_shuffle(int* out) {
  pdl_wait();
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
  } else {
    __syncwarp();
  }
}
inline __global__ void past_the_end(int* out) {
  pdl_wait();
  dynamic_smem<int>()[threadIdx.x] = 1;
  out[threadIdx.x] = 1;
}
inline __global__ void unset_shared(int* out) {
  pdl_wait();
  __shared__ int smem[32];
  out[threadIdx.x] = smem[threadIdx.x];
  smem[threadIdx.x] = 5;
}
inline __global__ void early_read(const int* in, int* out) {
  pdl_wait();
  __shared__ int smem[32];
  cp_async4(smem + threadIdx.x, in + threadIdx.x);
  cp_async_commit();
  out[threadIdx.x] = smem[threadIdx.x];
}
inline __global__ void unaligned_row(const uint16_t* in, uint32_t* out) {
  pdl_wait();
  uint32_t r[2];
  ldmatrix_x2(r, in + 4);
  out[threadIdx.x] = r[0];
}

inline void test_checks(Test& t) {
  const OnDevice<int> out(t, std::vector<int>(64));
  const OnDevice<uint16_t> halves(t, std::vector<uint16_t>(64));
  const CudaRun run = t.run();
  const auto fails = [&](const char* name, const char* text, auto launch_it) {
    t.expect_error<DeviceError>(name, text, launch_it);
  };
  fails("no pdl_wait", "pdl_wait", [&] { launch(run, without_wait, 1, 32, 0, out.get()); });
  fails("a barrier that one misses", "wait at barrier 1",
        [&] { launch(run, one_missing, 1, 64, 0, out.get()); });
  fails("lanes in different collectives", "different collectives",
        [&] { launch(run, split_shuffle, 1, 32, 0, out.get()); });
  fails("writes past the end", "outside its dynamic shared memory",
        [&] { launch(run, past_the_end, 1, 64, 200, out.get()); });
  fails("too many threads", "a block of 2048",
        [&] { launch(run, without_wait, 1, 2048, 0, out.get()); });
  fails("too much shared memory", "of dynamic shared memory",
        [&] { launch(run, past_the_end, 1, 64, 300000, out.get()); });
  fails("an unaligned row", "unaligned", [&] {
    launch(run, unaligned_row, 1, 32, 0, halves.get(), reinterpret_cast<uint32_t*>(out.get()));
  });
  launch(run, unset_shared, 2, 32, 0, out.get());
  t.report("shared memory is unset", out.host()[31] == -1, "it keeps what the last block left");
  const OnDevice<int> in(t, std::vector<int>(64, 7));
  launch(run, early_read, 1, 32, 0, in.get(), out.get());
  t.report("a copy not waited for", out.host()[0] == -1, "it was made at once");
}

#endif

}  // namespace mla::cuda::test
