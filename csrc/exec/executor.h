// A planned graph, ready to run again and again with new inputs.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "exec/planner.h"

namespace mla {

struct InputData {
  std::string_view name;
  Format format;
  Shape shape;
  const void* data;  // contiguous
};

class Executor {
 public:
  // Plans at once; throws UnsupportedError, MemoryLimitError.
  Executor(std::shared_ptr<const Graph> graph, std::shared_ptr<Workspace> workspace);

  // Every input of the graph must be given. Allocates nothing unless another executor of the
  // workspace made it grow in between. Not to be called from two threads at once per workspace.
  void run(std::span<const InputData> inputs, const Checkpoint& checkpoint);

  // In host memory; the values stay until the next run of any executor of the workspace.
  Tensor output(size_t i) const;
  size_t n_outputs() const { return graph_->outputs().size(); }
  const Plan& plan() const { return plan_; }
  const Graph& graph() const { return *graph_; }
  const Workspace& workspace() const { return *workspace_; }

 private:
  struct Segment {  // consecutive steps on one backend, or one copy
    int backend;
    size_t begin, end;  // into steps_
    Tensor copy_from, copy_to;
    bool is_copy() const { return begin == end; }
  };
  void bind();
  Tensor resolve(Node* node, Domain domain) const;
  void fill(std::span<const InputData> inputs);

  std::shared_ptr<const Graph> graph_;
  std::shared_ptr<Workspace> workspace_;
  Plan plan_;
  std::vector<Step> steps_;
  std::vector<Segment> segments_;
  std::vector<std::vector<int>> slot_of_;  // [domain][node id] -> slot, -1: none
  uint64_t bound_generation_ = ~uint64_t{0};
};

}  // namespace mla
