#pragma once

#include <pybind11/pybind11.h>

namespace mla::bindings {

void register_errors(pybind11::module_& m);
void register_formats(pybind11::module_& m);
void register_tensor(pybind11::module_& m);
void register_device_memory(pybind11::module_& m);
void register_cache(pybind11::module_& m);
void register_graph(pybind11::module_& m);
void register_backends(pybind11::module_& m);
void register_quant(pybind11::module_& m);
void register_memory(pybind11::module_& m);
void register_numa(pybind11::module_& m);
void register_topology(pybind11::module_& m);

}  // namespace mla::bindings
