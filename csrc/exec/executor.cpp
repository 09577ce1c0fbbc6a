#include "exec/executor.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <optional>
#include <set>

#include "base/error.h"

namespace mla {

Executor::Executor(std::shared_ptr<const Graph> graph, std::shared_ptr<Workspace> workspace)
    : graph_(std::move(graph)),
      workspace_(std::move(workspace)),
      plan_(make_plan(*graph_, *workspace_)),
      outputs_(graph_->outputs()),
      constants_(static_cast<size_t>(workspace_->n_domains())) {
  for (const auto& node : graph_->nodes()) {
    if (node->op == Op::input) inputs_.push_back(node.get());
  }
  slot_of_.assign(static_cast<size_t>(workspace_->n_domains()),
                  std::vector<int>(graph_->nodes().size(), -1));
  for (size_t i = 0; i < plan_.slots.size(); ++i) {
    const Slot& slot = plan_.slots[i];
    slot_of_[static_cast<size_t>(slot.domain)][static_cast<size_t>(slot.root->id)] =
        static_cast<int>(i);
  }
  const Workspace::Turn turn(*workspace_);
  copy_constants();
  bind();
}

Executor::~Executor() {
  if (!left_busy_) return;
  try {
    for (const Segment& segment : segments_) {
      workspace_->backends()[static_cast<size_t>(segment.backend)]->sync();
    }
  } catch (const std::exception&) {  // whoever uses the device next is told
  }
}

void Executor::copy_constants() {
  for (const PlannedStep& step : plan_.steps) {
    if (step.node == nullptr) continue;
    const Domain domain = workspace_->domain_of(step.backend);
    if (domain == kHost) continue;
    for (Node* in : step.node->inputs) {
      Node* root = in != nullptr ? root_of(in).node : nullptr;
      if (root == nullptr || root->op != Op::weight) continue;
      auto& copy = constants_[static_cast<size_t>(domain)][root];
      if (copy.data == nullptr) {
        MLA_CHECK(UnsupportedError, !is_in_parts(root), "executor: weight '", root->label,
                  "' is kept in parts, which ", workspace_->owner(domain).name(), " cannot read");
        copy = workspace_->constant(domain, Tensor(root->layout, root->constant));
      }
    }
  }
}

Tensor Executor::resolve(Node* node, Domain domain) const {
  const Root root = root_of(node);
  const bool is_state = root.node->op == Op::state;
  if (is_state || (root.node->op == Op::weight && domain == kHost)) {
    Tensor tensor(node->layout, root.node->constant);
    tensor.slices = root.node->slices;
    tensor.slices_offset = root.offset_bytes;
    if (!is_in_parts(root.node)) tensor.data += root.offset_bytes;
    return tensor;
  }
  if (root.node->op == Op::weight) {
    const Buffer& copy = constants_[static_cast<size_t>(domain)].at(root.node);
    return workspace_->owner(domain).constant_view(copy, root.node->layout, node->layout,
                                                   root.offset_bytes);
  }
  const int slot = slot_of_[static_cast<size_t>(domain)][static_cast<size_t>(root.node->id)];
  std::byte* base = workspace_->arena(domain).data.get();
  return Tensor(node->layout,
                base + plan_.slots[static_cast<size_t>(slot)].offset_bytes + root.offset_bytes);
}

void Executor::bind() {
  workspace_->order().settle();
  for (Domain d = 0; d < workspace_->n_domains(); ++d) {
    workspace_->reserve(d, static_cast<size_t>(plan_.arena_bytes[static_cast<size_t>(d)]));
  }
  for (size_t b = 0; b < plan_.scratch_bytes.size(); ++b) {
    workspace_->reserve_scratch(static_cast<int>(b), static_cast<size_t>(plan_.scratch_bytes[b]));
  }
  compile();
  bound_generation_ = workspace_->generation();
}

Step Executor::resolve(const PlannedStep& planned) const {
  Step step;
  step.node = planned.node;
  if (planned.node == nullptr) {
    const Slot& from = plan_.slots[static_cast<size_t>(planned.from_slot)];
    const Slot& to = plan_.slots[static_cast<size_t>(planned.to_slot)];
    step.out = resolve(to.root, to.domain);
    step.in[0] = resolve(from.root, from.domain);
    if (planned.bytes != 0) {  // slots begin and end at multiples of a word
      const Layout words = Layout::contiguous(Format::I32, Shape{planned.bytes / 4});
      step.out = Tensor(words, step.out.data);
      step.in[0] = Tensor(words, step.in[0].data);
    }
    return step;
  }
  const Domain domain = workspace_->domain_of(planned.backend);
  step.out = resolve(const_cast<Node*>(planned.node), domain);
  MLA_CHECK_SHAPE(planned.node->inputs.size() <= kMaxInputs, "executor: too many operands in ",
                  describe(*planned.node));
  for (size_t i = 0; i < planned.node->inputs.size(); ++i) {
    if (Node* in = planned.node->inputs[i]) step.in[i] = resolve(in, domain);
  }
  return step;
}

// The CPU's operations check for themselves; a device is not given what it cannot check.
void Executor::note_checks(const PlannedStep& planned) {
  if (planned.node == nullptr || workspace_->domain_of(planned.backend) == kHost) return;
  const IndexCheck check = index_check_of(*planned.node);
  if (check.indices == nullptr) return;
  const Op root = root_of(check.indices).node->op;
  if (root != Op::input && root != Op::weight) return;
  checks_.push_back({check, resolve(check.indices, kHost)});
}

std::vector<Use> Executor::uses_of(const PlannedStep& planned) const {
  if (planned.node != nullptr) return {{workspace_->domain_of(planned.backend), true}};
  return {{plan_.slots[static_cast<size_t>(planned.from_slot)].domain, false},
          {plan_.slots[static_cast<size_t>(planned.to_slot)].domain, true}};
}

void Executor::append(const PlannedStep& planned) {
  const std::vector<Use> uses = uses_of(planned);
  const bool only_copies =
      workspace_->n_domains() > 2 && planned.node == nullptr && uses.back().domain != kHost;
  if (segments_.empty() || segments_.back().backend != planned.backend ||
      segments_.back().only_copies != only_copies) {
    segments_.push_back({planned.backend, only_copies, steps_.size(), steps_.size(), {}, nullptr});
  }
  Segment& segment = segments_.back();
  for (const Use& use : uses) {
    const auto same = [&](const Use& known) { return known.domain == use.domain; };
    const auto known = std::ranges::find_if(segment.uses, same);
    if (known == segment.uses.end()) {
      segment.uses.push_back(use);
    } else {
      known->writes = known->writes || use.writes;
    }
  }
  steps_.push_back(resolve(planned));
  segment.end = steps_.size();
}

// Of each step's result: steps that read it, copies included, and outputs.
void Executor::count_readers() {
  std::vector<int> n_readers(graph_->nodes().size(), 0);
  const auto count = [&](const Node* root) { ++n_readers[static_cast<size_t>(root->id)]; };
  for (const PlannedStep& planned : plan_.steps) {
    if (planned.node == nullptr) {
      count(plan_.slots[static_cast<size_t>(planned.from_slot)].root);
      continue;
    }
    std::set<const Node*> roots;
    for (Node* in : planned.node->inputs) {
      if (in != nullptr) roots.insert(root_of(in).node);
    }
    std::ranges::for_each(roots, count);
  }
  for (const auto& output : outputs_) count(root_of(output.node).node);
  for (Step& step : steps_) {
    if (step.node == nullptr) continue;
    step.n_readers = n_readers[static_cast<size_t>(step.node->id)];
  }
}

void Executor::compile() {
  segments_.clear();
  checks_.clear();
  steps_.clear();
  for (const PlannedStep& planned : plan_.steps) {
    append(planned);
    note_checks(planned);
  }
  count_readers();
  for (Segment& segment : segments_) {  // programs point into steps_, which stays as it is now
    Backend& backend = *workspace_->backends()[static_cast<size_t>(segment.backend)];
    segment.program =
        backend.compile(std::span(steps_).subspan(segment.begin, segment.end - segment.begin),
                        workspace_->scratch(segment.backend));
  }
}

namespace {

std::string names(const std::vector<Node*>& inputs) {
  std::string text;
  for (const Node* node : inputs) text += concat(text.empty() ? "" : ", ", node->label);
  return text;
}

}  // namespace

void Executor::fill(std::span<const InputData> inputs) {
  for (const InputData& given : inputs) {
    const bool known = std::any_of(inputs_.begin(), inputs_.end(),
                                   [&](const Node* node) { return node->label == given.name; });
    MLA_CHECK_SHAPE(known, "run: no input '", given.name, "'; the graph has ", names(inputs_));
  }
  for (Node* node : inputs_) {
    const auto given = std::find_if(inputs.begin(), inputs.end(), [&](const InputData& data) {
      return data.name == node->label;
    });
    MLA_CHECK_SHAPE(given != inputs.end(), "run: ", inputs.size(), " inputs came, the graph has ",
                    inputs_.size(), ": '", node->label, "' is missing");
    MLA_CHECK_SHAPE(given->format == node->format() && given->shape == node->shape(), "input '",
                    given->name, "': ", format_name(given->format), " ", given->shape,
                    " came, accepted is ", node->layout);
    const Tensor to = resolve(node, kHost);
    if (given->data == nullptr) continue;  // no elements
    std::memcpy(to.data, given->data, static_cast<size_t>(to.span_bytes()));
  }
}

// All but leaving the last segment, which nobody may need.
void Executor::enqueue(std::span<const InputData> inputs, const Checkpoint& checkpoint) {
  Order& order = workspace_->order();
  order.wait(kHost);
  fill(inputs);
  for (const HostCheck& host : checks_) check_indices(host.check, host.indices);
  const Segment* before = nullptr;
  try {
    for (const Segment& segment : segments_) {
      if (before != nullptr) order.leave(before->backend, before->uses);
      before = &segment;
      order.enter(segment.backend, segment.uses);
      segment.program->run(checkpoint);
    }
  } catch (const std::exception&) {
    order.settle();
    throw;
  }
}

void Executor::run(std::span<const InputData> inputs, const Checkpoint& checkpoint) {
  const Workspace::Turn turn(*workspace_);
  if (bound_generation_ != workspace_->generation()) bind();
  const uint64_t values = workspace_->next_values();
  enqueue(inputs, checkpoint);
  workspace_->order().settle();
  left_busy_ = false;
  fetched_.assign(outputs_.size(), 0);
  values_ = values;  // what an exception stops leaves none
}

void Executor::begin(std::span<const InputData> inputs, const Checkpoint& checkpoint) {
  const Workspace::Turn turn(*workspace_);
  if (bound_generation_ != workspace_->generation()) bind();
  (void)workspace_->next_values();
  left_busy_ = true;
  enqueue(inputs, checkpoint);
  if (segments_.empty()) return;
  const Segment& last = segments_.back();
  workspace_->order().leave(last.backend, last.uses);
}

void Executor::fetch(size_t output) {
  const PlannedStep& hop = plan_.fetches[output];
  Backend& backend = *workspace_->backends()[static_cast<size_t>(hop.backend)];
  const Step step = resolve(hop);
  backend.copy(step.out, step.in[0]);
  backend.sync();
  fetched_[output] = 1;
}

Tensor Executor::output(size_t i) {
  MLA_CHECK_SHAPE(i < outputs_.size(), "output ", i, " of ", outputs_.size());
  const bool due = plan_.fetches[i].to_slot >= 0 && fetched_[i] == 0;
  std::optional<Workspace::Turn> turn;
  if (due) turn.emplace(*workspace_);
  MLA_CHECK(DeviceError, values_ == workspace_->values(), "output ", i,
            ": its values are not there: ",
            left_busy_     ? "the last run was not waited for"
            : values_ == 0 ? "nothing has run yet"
                           : "the workspace has been used since");
  const Node* root = root_of(outputs_[i].node).node;
  MLA_CHECK(UnsupportedError, root->home == nullptr, "output ", i, ": a state in the memory of a ",
            "device cannot be read here");
  if (due) fetch(i);
  return resolve(outputs_[i].node, kHost);
}

}  // namespace mla
