#include "exec/executor.h"

#include <cstring>

#include "base/error.h"

namespace mla {

Executor::Executor(std::shared_ptr<const Graph> graph, std::shared_ptr<Workspace> workspace)
    : graph_(std::move(graph)),
      workspace_(std::move(workspace)),
      plan_(make_plan(*graph_, *workspace_)) {
  slot_of_.assign(static_cast<size_t>(workspace_->n_domains()),
                  std::vector<int>(graph_->nodes().size(), -1));
  for (size_t i = 0; i < plan_.slots.size(); ++i) {
    const Slot& slot = plan_.slots[i];
    slot_of_[static_cast<size_t>(slot.domain)][static_cast<size_t>(slot.root->id)] =
        static_cast<int>(i);
  }
  for (Domain d = 0; d < workspace_->n_domains(); ++d) {
    workspace_->reserve(d, static_cast<size_t>(plan_.arena_bytes[static_cast<size_t>(d)]));
  }
  for (size_t b = 0; b < plan_.scratch_bytes.size(); ++b) {
    workspace_->reserve_scratch(static_cast<int>(b), static_cast<size_t>(plan_.scratch_bytes[b]));
  }
  bind();
}

Tensor Executor::resolve(Node* node, Domain domain) const {
  const Root root = root_of(node);
  if (root.node->op == Op::weight || root.node->op == Op::state) {
    const Tensor whole(root.node->layout, root.node->constant);
    if (domain == kHost) return Tensor(node->layout, whole.data + root.offset_bytes);
    // A device holds the weight densely, so a view of it is found by its own strides only.
    return workspace_->constant(domain, Tensor(node->layout, whole.data + root.offset_bytes));
  }
  const int slot = slot_of_[static_cast<size_t>(domain)][static_cast<size_t>(root.node->id)];
  std::byte* base = workspace_->arena(domain).data.get();
  return Tensor(node->layout,
                base + plan_.slots[static_cast<size_t>(slot)].offset_bytes + root.offset_bytes);
}

void Executor::bind() {
  steps_.clear();
  segments_.clear();
  for (const PlannedStep& planned : plan_.steps) {
    if (planned.node == nullptr) {
      const Slot& from = plan_.slots[static_cast<size_t>(planned.from_slot)];
      const Slot& to = plan_.slots[static_cast<size_t>(planned.to_slot)];
      segments_.push_back({planned.backend, steps_.size(), steps_.size(),
                           resolve(from.root, from.domain), resolve(to.root, to.domain)});
      continue;
    }
    const Domain domain = workspace_->domain_of(planned.backend);
    Step step;
    step.node = planned.node;
    step.out = resolve(const_cast<Node*>(planned.node), domain);
    MLA_CHECK_SHAPE(planned.node->inputs.size() <= kMaxInputs, "executor: too many operands in ",
                    describe(*planned.node));
    for (size_t i = 0; i < planned.node->inputs.size(); ++i) {
      if (Node* in = planned.node->inputs[i]) step.in[i] = resolve(in, domain);
    }
    const bool joins = !segments_.empty() && !segments_.back().is_copy() &&
                       segments_.back().backend == planned.backend;
    if (!joins) segments_.push_back({planned.backend, steps_.size(), steps_.size(), {}, {}});
    steps_.push_back(step);
    segments_.back().end = steps_.size();
  }
  bound_generation_ = workspace_->generation();
}

void Executor::fill(std::span<const InputData> inputs) {
  size_t n_declared = 0;
  for (const auto& node : graph_->nodes()) n_declared += node->op == Op::input;
  for (const InputData& given : inputs) {
    Node* node = graph_->find_input(given.name);
    MLA_CHECK_SHAPE(given.format == node->format() && given.shape == node->shape(), "input '",
                    given.name, "': ", format_name(given.format), " ", given.shape,
                    " came, accepted is ", node->layout);
    const Tensor to = resolve(node, kHost);
    std::memcpy(to.data, given.data, static_cast<size_t>(to.span_bytes()));
  }
  MLA_CHECK_SHAPE(inputs.size() == n_declared, "run: ", inputs.size(),
                  " inputs came, the graph has ", n_declared);
}

void Executor::run(std::span<const InputData> inputs, const Checkpoint& checkpoint) {
  if (bound_generation_ != workspace_->generation()) bind();
  fill(inputs);
  const auto& backends = workspace_->backends();
  for (const Segment& segment : segments_) {
    Backend& backend = *backends[static_cast<size_t>(segment.backend)];
    if (segment.is_copy()) {
      backend.copy(segment.copy_to, segment.copy_from);
    } else {
      backend.run(std::span(steps_).subspan(segment.begin, segment.end - segment.begin),
                  workspace_->scratch(segment.backend), checkpoint);
    }
  }
  for (const auto& backend : backends) backend->sync();
}

Tensor Executor::output(size_t i) const {
  MLA_CHECK_SHAPE(i < graph_->outputs().size(), "output ", i, " of ", graph_->outputs().size());
  return resolve(graph_->outputs()[i], kHost);
}

}  // namespace mla
