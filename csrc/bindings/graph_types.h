// The Python side's hold on graphs: nodes and executors keep the graph and its memory alive.
#pragma once

#include <memory>
#include <vector>

#include "bindings/convert.h"
#include "graph/graph.h"

namespace mla::bindings {

struct PyGraph {
  std::shared_ptr<Graph> graph = std::make_shared<Graph>();
  std::shared_ptr<std::vector<pybind11::object>> owners =
      std::make_shared<std::vector<pybind11::object>>();
};

struct PyNode {
  std::shared_ptr<Graph> graph;
  Node* node;
};

}  // namespace mla::bindings
