// Launches and streams of the emulated device, as backends/cuda/runtime.h takes them.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "emulator/block.h"
#include "emulator/device.h"

namespace mla::cuda {

using Stream = void*;

}  // namespace mla::cuda

namespace mla::emulator {

// Runs it, or keeps it where the stream is being recorded.
void enqueue(cuda::Stream stream, std::function<void()> work);

}  // namespace mla::emulator

namespace mla::cuda {

// As a template over the run, which is declared further on.
template <class Run, class... P>
void launch_kernel(const Run& run, void (*kernel)(P...), dim3 grid, dim3 block,
                   size_t dynamic_smem_bytes, std::tuple<P...> args) {
  emulator::Launch launch;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.grid = {grid.x, grid.y, grid.z};
  launch.block = {block.x, block.y, block.z};
  launch.dynamic_smem_bytes = dynamic_smem_bytes;
  launch.smem_limit_bytes = run.device.smem_per_block;
  launch.body = [kernel, args = std::move(args)] { std::apply(kernel, args); };
  emulator::enqueue(run.stream, [launch = std::move(launch)] { emulator::run(launch); });
}

}  // namespace mla::cuda
