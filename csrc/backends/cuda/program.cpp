#include "backends/cuda/program.h"

#include <exception>

namespace mla::cuda {

// Recording and instantiating cost more than a run, so the first one goes without: the ends of
// prompts come once. It also loads the kernels, which cannot be done while recording.
void CudaProgram::run(const Checkpoint& checkpoint) {
  if (!backend_.records() || n_runs_++ == 0) {
    backend_.run(launches_, scratch_, checkpoint);
    return;
  }
  checkpoint();
  use_device(backend_.device().index);
  if (!graph_) record();
  graph_.launch(backend_.stream());
}

void CudaProgram::record() {
  begin_recording(backend_.stream());
  try {
    backend_.run(launches_, scratch_, [] {});
  } catch (const std::exception&) {
    abandon_recording(backend_.stream());
    throw;
  }
  graph_ = end_recording(backend_.stream());
}

}  // namespace mla::cuda
