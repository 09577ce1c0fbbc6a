#include "graph/graph.h"

#include <array>
#include <utility>

#include "base/error.h"

namespace mla {

std::string_view op_name(Op op) {
  static constexpr std::array<std::string_view, kOpCount> kNames = {{
#define MLA_OP(name) #name,
#include "graph/ops.def"
  }};
  return kNames[static_cast<size_t>(op)];
}

Root root_of(Node* node) {
  int64_t offset = 0;
  while (node->source != nullptr) {
    offset += node->offset_bytes;
    node = node->source;
  }
  return {node, offset};
}

bool is_in_parts(const Node* node) {
  const Slices* slices = root_of(const_cast<Node*>(node)).node->slices;
  return slices != nullptr && !slices->in_place;
}

std::string describe(const Node& node) {
  std::string text = concat(op_name(node.op), "(");
  const char* comma = "";
  for (const Node* in : node.inputs) {
    if (in == nullptr) continue;
    text += concat(comma, in->layout);
    if (!in->label.empty()) text += concat(" '", in->label, "'");
    comma = ", ";
  }
  return text + ")";
}

Node* Graph::adopt(std::unique_ptr<Node> node) {
  node->id = static_cast<int>(nodes_.size());
  nodes_.push_back(std::move(node));
  return nodes_.back().get();
}

Node* Graph::input(std::string name, Format format, const Shape& shape) {
  for (const auto& node : nodes_) {
    MLA_CHECK_SHAPE(node->op != Op::input || node->label != name, "input '", name,
                    "' is declared twice");
  }
  auto node = std::make_unique<Node>();
  node->op = Op::input;
  node->label = std::move(name);
  node->layout = Layout::contiguous(format, shape);
  return adopt(std::move(node));
}

Node* Graph::weight(std::string name, const Tensor& tensor) {
  auto node = std::make_unique<Node>();
  node->op = Op::weight;
  node->label = std::move(name);
  node->layout = tensor;
  node->constant = tensor.data;
  node->slices = tensor.slices;
  return adopt(std::move(node));
}

Node* Graph::state(std::string name, const Tensor& tensor, const void* home) {
  Node* node = weight(std::move(name), tensor);
  node->op = Op::state;
  node->home = home;
  return node;
}

void Graph::check_own(const Node* node) const {
  const auto id = static_cast<size_t>(node->id);
  MLA_CHECK_SHAPE(id < nodes_.size() && nodes_[id].get() == node, "graph: ", op_name(node->op), " ",
                  node->layout, " is a node of another graph");
}

void Graph::output(Node* node, bool on_demand) {
  check_own(node);
  MLA_CHECK(UnsupportedError, !is_in_parts(node), "graph: ", node->layout,
            " is kept in parts and can be no output");
  outputs_.push_back({node, on_demand});
}

Node* Graph::add_node(Op op, const Layout& layout, std::vector<Node*> inputs, Attrs attrs) {
  for (const Node* input : inputs) {
    if (input != nullptr) check_own(input);
  }
  auto node = std::make_unique<Node>();
  node->op = op;
  node->layout = layout;
  node->inputs = std::move(inputs);
  node->attrs = std::move(attrs);
  node->device = device_;
  return adopt(std::move(node));
}

Node* Graph::add_view(Node* of, const Layout& layout, int64_t offset_bytes) {
  check_own(of);
  auto node = std::make_unique<Node>();
  node->op = Op::view;
  node->layout = layout;
  node->inputs = {of};
  node->source = of;
  node->offset_bytes = offset_bytes;
  return adopt(std::move(node));
}

}  // namespace mla
