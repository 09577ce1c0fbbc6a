// Decides, before anything runs, which backend computes each node, where values are copied between
// memories, and where in the arenas they lie.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "exec/workspace.h"
#include "graph/graph.h"

namespace mla {

// A value in one memory domain. Live from the step that writes it (-1: before the run) to the last
// that reads it.
struct Slot {
  Node* root = nullptr;  // Op::input or a computing node
  Domain domain = kHost;
  int first = -1;
  int last = -1;
  int64_t bytes = 0;
  int64_t offset_bytes = 0;  // in the domain's arena
};

// One thing to do: a node on a backend, or (node == nullptr) a hop: a value copied by a backend to
// or from its own memory.
struct PlannedStep {
  int backend = 0;
  const Node* node = nullptr;
  int from_slot = -1;
  int to_slot = -1;
  int64_t bytes = 0;  // of values that lie side by side in both; 0: of one, as it is laid out
};

struct Plan {
  std::vector<Slot> slots;
  std::vector<PlannedStep> steps;
  std::vector<PlannedStep> fetches;    // by output: the hop it is due on demand; to_slot < 0: none
  std::vector<int64_t> arena_bytes;    // by domain
  std::vector<int64_t> scratch_bytes;  // by backend
  int64_t unshared_bytes = 0;          // what the arenas would take without reuse
  int n_copies = 0;
};

// Throws UnsupportedError naming op, formats and shapes where no backend supports a node.
Plan make_plan(const Graph& graph, const Workspace& workspace);

}  // namespace mla
