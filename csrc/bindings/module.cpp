// The extension module: conversions only. Each register_* file binds one part of the core.
#include "bindings/register.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native core of mla_backend. Use the public modules; this one may change.";
  mla::bindings::register_errors(m);
  mla::bindings::register_formats(m);
  mla::bindings::register_tensor(m);
  mla::bindings::register_graph(m);
  mla::bindings::register_numa(m);
  mla::bindings::register_backends(m);
  mla::bindings::register_device_memory(m);
  mla::bindings::register_cache(m);
  mla::bindings::register_quant(m);
  mla::bindings::register_memory(m);
  mla::bindings::register_topology(m);
}
