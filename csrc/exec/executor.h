// A planned graph, ready to run again and again with new inputs.
#pragma once

#include <memory>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "exec/index_checks.h"
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
  // Plans at once; throws UnsupportedError, MemoryLimitError, DeviceError where the workspace is in
  // use. What is added to the graph later is not seen.
  Executor(std::shared_ptr<const Graph> graph, std::shared_ptr<Workspace> workspace);

  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Every input of the graph must be given. Allocates nothing unless another executor of the
  // workspace made it grow in between. Throws DeviceError where the workspace is in use.
  void run(std::span<const InputData> inputs, const Checkpoint& checkpoint);

  // Like run, but devices may still be at work when it returns: what runs next in the workspace
  // comes after it, and what fails is thrown there. There are no outputs.
  void begin(std::span<const InputData> inputs, const Checkpoint& checkpoint);

  // In host memory; the values stay until another run in the workspace or an executor that makes it
  // grow. Throws DeviceError where they are gone, or there were none yet.
  // What is due on demand is copied there by the first call.
  Tensor output(size_t i);
  int64_t n_steps() const { return static_cast<int64_t>(steps_.size()); }
  const Plan& plan() const { return plan_; }
  const Workspace& workspace() const { return *workspace_; }

 private:
  // Consecutive steps on one backend. Beside a second device copies to a device are apart, so that
  // whoever waits for what they read does not wait for what comes after them.
  struct Segment {
    int backend;
    bool only_copies;
    size_t begin, end;  // into steps_
    std::vector<Use> uses;
    std::unique_ptr<Program> program;
  };
  void bind();
  Tensor resolve(Node* node, Domain domain) const;
  Step resolve(const PlannedStep& planned) const;
  void compile();
  void append(const PlannedStep& planned);
  std::vector<Use> uses_of(const PlannedStep& planned) const;
  void note_checks(const PlannedStep& planned);
  void count_readers();
  void copy_constants();
  void fill(std::span<const InputData> inputs);
  void fetch(size_t output);
  void enqueue(std::span<const InputData> inputs, const Checkpoint& checkpoint);

  std::shared_ptr<const Graph> graph_;
  std::shared_ptr<Workspace> workspace_;
  Plan plan_;
  std::vector<Step> steps_;
  struct HostCheck {
    IndexCheck check;
    Tensor indices;  // in host memory
  };
  std::vector<HostCheck> checks_;
  std::vector<Segment> segments_;
  std::vector<Node*> inputs_;
  std::vector<Output> outputs_;
  std::vector<char> fetched_;              // by output, of the last run
  std::vector<std::vector<int>> slot_of_;  // [domain][node id] -> slot, -1: none
  // Of each device: its copies of weights, by the weight.
  std::vector<std::unordered_map<const Node*, Buffer>> constants_;
  uint64_t bound_generation_ = ~uint64_t{0};
  uint64_t values_ = 0;     // those of the last run
  bool left_busy_ = false;  // the last run may still be going on
};

}  // namespace mla
