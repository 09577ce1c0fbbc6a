// A graph under construction: the builders check shapes once, so that kernels may trust them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "graph/node.h"

namespace mla {

// What can be read after a run: at once, or, on_demand, when it is asked for. The latter stays
// where it was computed until then, which spares a copy that few runs need.
struct Output {
  Node* node;
  bool on_demand;
};

class Graph {
 public:
  Node* input(std::string name, Format format, const Shape& shape);
  Node* weight(std::string name, const Tensor& tensor);
  Node* state(std::string name, const Tensor& tensor, const void* home = nullptr);
  void output(Node* node, bool on_demand = false);  // may be called several times

  // The only way a computing or view node comes to be; builders in graph/ops call it. Throws
  // ShapeError for operands of another graph.
  Node* add_node(Op op, const Layout& layout, std::vector<Node*> inputs, Attrs attrs = {});
  Node* add_view(Node* of, const Layout& layout, int64_t offset_bytes);

  // Nodes from now on are computed there if that backend can: see Node::device.
  void place_on(std::string device) { device_ = std::move(device); }

  const std::vector<std::unique_ptr<Node>>& nodes() const { return nodes_; }
  const std::vector<Output>& outputs() const { return outputs_; }

 private:
  Node* adopt(std::unique_ptr<Node> node);
  void check_own(const Node* node) const;
  std::vector<std::unique_ptr<Node>> nodes_;
  std::vector<Output> outputs_;
  std::string device_;
};

}  // namespace mla
