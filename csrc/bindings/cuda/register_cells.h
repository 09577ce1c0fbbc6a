#pragma once

#include <pybind11/pybind11.h>

#include "backends/cuda/cuda_backend.h"

namespace mla::bindings {

void register_cells(
    pybind11::class_<cuda::CudaBackend, Backend, std::shared_ptr<cuda::CudaBackend>>& backend);

}  // namespace mla::bindings
