#include "exec/planner.h"

#include <algorithm>
#include <set>
#include <unordered_map>

#include "base/error.h"

namespace mla {
namespace {

constexpr int64_t kAlignment = 64;  // a cache line: no two values share one

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Whether all state that the node touches lies in this domain: it is never copied.
bool reaches_state(const Node& node, const Workspace& workspace, Domain domain) {
  for (Node* in : node.inputs) {
    const Node* root = in != nullptr ? root_of(in).node : nullptr;
    if (root == nullptr || root->op != Op::state) continue;
    if (workspace.domain_of_home(root->home) != domain) return false;
  }
  return true;
}

class Planner {
 public:
  Planner(const Graph& graph, const Workspace& workspace) : graph_(graph), workspace_(workspace) {
    plan_.arena_bytes.resize(static_cast<size_t>(workspace.n_domains()));
    plan_.scratch_bytes.resize(workspace.backends().size());
    inputs_of_.resize(static_cast<size_t>(workspace.n_domains()));
  }

  Plan make() {
    for (const auto& node : graph_.nodes()) {
      if (node->op == Op::input) {
        add_slot(node.get(), kHost, -1);
      } else if (computes(*node)) {
        choose_backend(*node);
      }
    }
    for (Domain domain = kHost + 1; domain < workspace_.n_domains(); ++domain) {
      carry_inputs(domain);
    }
    for (const auto& node : graph_.nodes()) {
      if (computes(*node)) plan_node(node.get());
    }
    plan_outputs();
    place();
    return std::move(plan_);
  }

 private:
  static constexpr int kForever = INT32_MAX;

  static bool computes(const Node& node) { return !node.is_leaf() && node.op != Op::view; }

  void choose_backend(const Node& node) {
    const int backend = best_backend(node);
    backend_of_[&node] = backend;
    auto& inputs = inputs_of_[static_cast<size_t>(workspace_.domain_of(backend))];
    for (Node* in : node.inputs) {
      Node* root = in != nullptr ? root_of(in).node : nullptr;
      if (root != nullptr && root->op == Op::input) inputs.insert(root->id);
    }
  }

  int best_backend(const Node& node) const {
    const auto& backends = workspace_.backends();
    for (size_t i = 0; i < backends.size(); ++i) {
      if (backends[i]->name() == node.device && can_run(node, i)) return static_cast<int>(i);
    }
    for (size_t i = 0; i < backends.size(); ++i) {
      if (can_run(node, i)) return static_cast<int>(i);
    }
    std::string why;
    for (size_t i = 0; i < backends.size(); ++i) {
      const bool supported = backends[i]->supports_op(node);
      why += concat(i ? "; " : "", backends[i]->name(), ": ",
                    supported ? "its state lies elsewhere" : backends[i]->refusal(node));
    }
    throw UnsupportedError(concat("no backend supports ", describe(node), " (", why, ")"));
  }

  bool can_run(const Node& node, size_t i) const {
    const Domain domain = workspace_.domain_of(static_cast<int>(i));
    return reaches_state(node, workspace_, domain) && workspace_.backends()[i]->supports_op(node);
  }

  void plan_node(Node* node) {
    const int backend = backend_of_.at(node);
    const Domain domain = workspace_.domain_of(backend);
    for (Node* in : node->inputs) {
      if (in == nullptr) continue;
      Node* root = root_of(in).node;
      if (root->op != Op::weight && root->op != Op::state) use(root, domain, kNow);
    }
    const int step = static_cast<int>(plan_.steps.size());
    for (int slot : touched_) plan_.slots[static_cast<size_t>(slot)].last = step;
    touched_.clear();
    plan_.steps.push_back({backend, node, -1, -1});
    add_slot(node, domain, step);
    auto& scratch = plan_.scratch_bytes[static_cast<size_t>(backend)];
    scratch = std::max(
        scratch, static_cast<int64_t>(
                     workspace_.backends()[static_cast<size_t>(backend)]->scratch_bytes(*node)));
  }

  static constexpr int kNow = -2;  // the step that is about to be planned

  int add_slot(Node* root, Domain domain, int step) {
    const int index = static_cast<int>(plan_.slots.size());
    const int64_t bytes = aligned(root->layout.span_bytes());
    plan_.slots.push_back({root, domain, step, step, bytes, 0});
    by_root_[root].push_back(index);
    plan_.unshared_bytes += bytes;
    return index;
  }

  // The slot of `root` in `domain`, copied there first if it is elsewhere only.
  int use(Node* root, Domain domain, int until) {
    int slot = find(root, domain);
    if (slot < 0) {
      const int source = source_for(root, domain);
      const Domain from = plan_.slots[static_cast<size_t>(source)].domain;
      const int step = static_cast<int>(plan_.steps.size());
      slot = add_slot(root, domain, step);
      plan_.slots[static_cast<size_t>(source)].last =
          std::max(plan_.slots[static_cast<size_t>(source)].last, step);
      plan_.steps.push_back({device_between(from, domain), nullptr, source, slot});
      ++plan_.n_copies;
    }
    if (until == kForever) {
      plan_.slots[static_cast<size_t>(slot)].last = kForever;
    } else {
      touched_.push_back(slot);
    }
    return slot;
  }

  // Where a copy into `domain` comes from: the host, unless the value lies in a memory within
  // reach.
  int source_for(Node* root, Domain domain) {
    const auto& slots = by_root_[root];
    if (domain == kHost) return slots.front();
    for (const int slot : slots) {
      const Domain from = plan_.slots[static_cast<size_t>(slot)].domain;
      const bool direct = root->op != Op::input && from != kHost &&
                          workspace_.owner(domain).reaches(workspace_.owner(from));
      if (direct) return slot;
    }
    return use(root, kHost, kNow);
  }

  // All inputs that will be wanted in `domain`, before anything else, so that the host can fill in
  // the next ones soon. They are small, and born before the run: so they lie in both memories in
  // the order in which they were declared, and those without a gap between them on the host go as
  // one.
  void carry_inputs(Domain domain) {
    const Node* before = nullptr;
    for (const int id : inputs_of_[static_cast<size_t>(domain)]) {
      Node* root = graph_.nodes()[static_cast<size_t>(id)].get();
      const int to = add_slot(root, domain, -1);
      const int from = by_root_[root].front();
      if (plan_.slots[static_cast<size_t>(from)].bytes == 0) continue;  // it lies nowhere
      if (before == nullptr || !follows(*before, *root)) {
        plan_.steps.push_back({device_between(kHost, domain), nullptr, from, to});
        ++plan_.n_copies;
      }
      Slot& source = plan_.slots[static_cast<size_t>(from)];
      source.last = std::max(source.last, static_cast<int>(plan_.steps.size()) - 1);
      plan_.steps.back().bytes += source.bytes;
      before = root;
    }
  }

  // Whether no input was declared between the two.
  bool follows(const Node& before, const Node& next) const {
    for (int id = before.id + 1; id < next.id; ++id) {
      if (graph_.nodes()[static_cast<size_t>(id)]->op == Op::input) return false;
    }
    return true;
  }

  void plan_outputs() {
    const auto& outputs = graph_.outputs();
    plan_.fetches.resize(outputs.size());
    for (const bool on_demand : {false, true}) {  // what is there anyway need not be asked for
      for (size_t i = 0; i < outputs.size(); ++i) {
        Node* root = root_of(outputs[i].node).node;
        if (outputs[i].on_demand != on_demand) continue;
        if (root->op == Op::weight || root->op == Op::state) continue;
        on_demand ? keep(root, i) : static_cast<void>(use(root, kHost, kForever));
      }
    }
  }

  // A place for the value on the host, and the hop that fills it once it is asked for.
  void keep(Node* root, size_t output) {
    const int source = by_root_[root].front();
    plan_.slots[static_cast<size_t>(source)].last = kForever;
    const int there = find(root, kHost);
    if (there >= 0) {
      plan_.slots[static_cast<size_t>(there)].last = kForever;
    } else {
      const Domain from = plan_.slots[static_cast<size_t>(source)].domain;
      const int to = add_slot(root, kHost, static_cast<int>(plan_.steps.size()));
      plan_.slots[static_cast<size_t>(to)].last = kForever;
      fetch_of_[root] = {device_between(from, kHost), nullptr, source, to};
    }
    if (const auto it = fetch_of_.find(root); it != fetch_of_.end()) {
      plan_.fetches[output] = it->second;
    }
  }

  int find(const Node* root, Domain domain) const {
    const auto it = by_root_.find(root);
    if (it == by_root_.end()) return -1;
    for (int slot : it->second) {
      if (plan_.slots[static_cast<size_t>(slot)].domain == domain) return slot;
    }
    return -1;
  }

  // Who copies: the device that the value comes to, or else the one that it comes from.
  int device_between(Domain from, Domain to) const {
    const Domain device = to == kHost ? from : to;
    const auto& backends = workspace_.backends();
    for (size_t i = 0; i < backends.size(); ++i) {
      if (workspace_.domain_of(static_cast<int>(i)) == device) return static_cast<int>(i);
    }
    return 0;
  }

  // First fit in order of birth: the lowest gap among the values alive at the same time. Inputs are
  // born before the run, wherever in the graph they were declared.
  void place() {
    std::vector<Slot*> born;
    for (Slot& slot : plan_.slots) born.push_back(&slot);
    std::stable_sort(born.begin(), born.end(),
                     [](const Slot* a, const Slot* b) { return a->first < b->first; });
    std::vector<Slot*> alive;
    for (Slot* next : born) {
      Slot& slot = *next;
      std::erase_if(alive, [&](const Slot* other) { return other->last < slot.first; });
      int64_t at = 0;
      for (const Slot* other : alive) {  // sorted by offset
        if (other->domain != slot.domain) continue;
        if (at + slot.bytes <= other->offset_bytes) break;
        at = std::max(at, other->offset_bytes + other->bytes);
      }
      slot.offset_bytes = at;
      auto& arena = plan_.arena_bytes[static_cast<size_t>(slot.domain)];
      arena = std::max(arena, at + slot.bytes);
      alive.insert(std::upper_bound(alive.begin(), alive.end(), &slot,
                                    [](const Slot* a, const Slot* b) {
                                      return a->offset_bytes < b->offset_bytes;
                                    }),
                   &slot);
    }
  }

  const Graph& graph_;
  const Workspace& workspace_;
  Plan plan_;
  std::unordered_map<const Node*, std::vector<int>> by_root_;
  std::vector<int> touched_;
  std::unordered_map<const Node*, int> backend_of_;
  std::vector<std::set<int>> inputs_of_;  // by domain: ids of the inputs that its nodes read
  std::unordered_map<const Node*, PlannedStep> fetch_of_;
};

}  // namespace

Plan make_plan(const Graph& graph, const Workspace& workspace) {
  return Planner(graph, workspace).make();
}

}  // namespace mla
