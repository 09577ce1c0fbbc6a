// Graph building: every method checks shapes and adds a node.
#include "bindings/graph_types.h"
#include "bindings/register.h"
#include "graph/ops.h"

namespace py = pybind11;
using py::arg;

namespace mla::bindings {
namespace {

Precision to_precision(const std::string& name) {
  if (name == "fast") return Precision::fast;
  MLA_CHECK(UnsupportedError, name == "exact", "precision '", name, "', accepted is fast or exact");
  return Precision::exact;
}

Gating to_gating(const std::string& name) {
  if (name == "softmax") return Gating::softmax;
  MLA_CHECK(UnsupportedError, name == "sigmoid", "gating '", name,
            "', accepted is softmax or sigmoid");
  return Gating::sigmoid;
}

Contraction to_contraction(const std::string& name) {
  if (name == "any") return Contraction::any;
  if (name == "absorbed") return Contraction::absorbed;
  MLA_CHECK(UnsupportedError, name == "expanded", "contraction '", name,
            "', accepted is any, absorbed or expanded");
  return Contraction::expanded;
}

GroupScore to_group_score(const std::string& name) {
  if (name == "max") return GroupScore::max;
  MLA_CHECK(UnsupportedError, name == "top2_sum", "group_score '", name,
            "', accepted is max or top2_sum");
  return GroupScore::top2_sum;
}

PyNode wrap(const PyGraph& g, Node* node) { return {g.graph, node}; }
Node* raw(const std::optional<PyNode>& node) { return node ? node->node : nullptr; }

using Optional = std::optional<PyNode>;
constexpr auto kNone = std::nullopt;

void bind_leaves(py::class_<PyGraph>& graph) {
  graph
      .def(
          "input",
          [](PyGraph& g, std::string name, const std::string& format,
             const std::vector<int64_t>& shape) {
            return wrap(g, g.graph->input(std::move(name), to_format(format), to_shape(shape)));
          },
          arg("name"), arg("format"), arg("shape"), "A value given to each run.")
      .def(
          "weight",
          [](PyGraph& g, std::string name, const PyTensor& t) {
            g.owners->push_back(t.owner);
            return wrap(g, g.graph->weight(std::move(name), t.tensor));
          },
          arg("name"), arg("tensor"), "Constant memory; any strides.")
      .def(
          "state",
          [](PyGraph& g, std::string name, const PyTensor& t) {
            check_writable("state", t);
            g.owners->push_back(t.owner);
            return wrap(g, g.graph->state(std::move(name), t.tensor, t.home));
          },
          arg("name"), arg("tensor"), "Memory that runs may write: the cache.")
      .def(
          "place_on", [](PyGraph& g, std::string device) { g.graph->place_on(std::move(device)); },
          arg("device"),
          "Nodes from now on are computed by the backend of this name where it can; \"\": by the "
          "first of the workspace that can.")
      .def(
          "output",
          [](PyGraph& g, const PyNode& x, bool on_demand) { g.graph->output(x.node, on_demand); },
          arg("x"), arg("on_demand") = false,
          "Keeps x readable after a run; outputs are numbered in the order of these calls. "
          "on_demand: it stays in the memory of its device until it is read.")
      .def("describe", [](const PyGraph& g) {
        std::vector<std::string> lines;
        for (const auto& node : g.graph->nodes()) {
          lines.push_back(concat(op_name(node->op), " ", node->layout, " ", describe(*node)));
        }
        return lines;
      });
}

void bind_views(py::class_<PyGraph>& graph) {
  graph
      .def(
          "permute",
          [](PyGraph& g, const PyNode& x, const std::vector<int>& axes) {
            return wrap(g, view_permute(*g.graph, x.node, axes));
          },
          arg("x"), arg("axes"))
      .def(
          "slice",
          [](PyGraph& g, const PyNode& x, int axis, int64_t begin, int64_t end) {
            return wrap(g, view_slice(*g.graph, x.node, axis, begin, end));
          },
          arg("x"), arg("axis"), arg("begin"), arg("end"))
      .def(
          "reshape",
          [](PyGraph& g, const PyNode& x, const std::vector<int64_t>& shape) {
            return wrap(g, view_reshape(*g.graph, x.node, to_shape(shape)));
          },
          arg("x"), arg("shape"))
      .def(
          "broadcast",
          [](PyGraph& g, const PyNode& x, const std::vector<int64_t>& shape) {
            return wrap(g, view_broadcast(*g.graph, x.node, to_shape(shape)));
          },
          arg("x"), arg("shape"));
}

void bind_rows(py::class_<PyGraph>& graph) {
  graph
      .def(
          "copy",
          [](PyGraph& g, const PyNode& x, const std::string& format) {
            return wrap(g, copy(*g.graph, x.node, to_format(format)));
          },
          arg("x"), arg("format"))
      .def(
          "add",
          [](PyGraph& g, const PyNode& a, const PyNode& b) {
            return wrap(g, add(*g.graph, a.node, b.node));
          },
          arg("a"), arg("b"))
      .def(
          "get_rows",
          [](PyGraph& g, const PyNode& table, const PyNode& ids) {
            return wrap(g, get_rows(*g.graph, table.node, ids.node));
          },
          arg("table"), arg("ids"))
      .def(
          "rms_norm",
          [](PyGraph& g, const PyNode& x, const Optional& weight, float eps) {
            return wrap(g, rms_norm(*g.graph, x.node, raw(weight), {eps}));
          },
          arg("x"), arg("weight") = kNone, arg("eps") = 1e-6f)
      .def(
          "rope",
          [](PyGraph& g, const PyNode& x, const PyNode& positions, const PyNode& frequencies,
             float scale) {
            return wrap(g, rope(*g.graph, x.node, positions.node, frequencies.node, {scale}));
          },
          arg("x"), arg("positions"), arg("frequencies"), arg("scale") = 1.0f)
      .def(
          "softmax",
          [](PyGraph& g, const PyNode& x, const Optional& mask, float scale) {
            return wrap(g, softmax(*g.graph, x.node, raw(mask), {scale}));
          },
          arg("x"), arg("mask") = kNone, arg("scale") = 1.0f)
      .def(
          "swiglu",
          [](PyGraph& g, const PyNode& gate, const PyNode& up) {
            return wrap(g, swiglu(*g.graph, gate.node, up.node));
          },
          arg("gate"), arg("up"));
}

void bind_products(py::class_<PyGraph>& graph) {
  graph
      .def(
          "matmul",
          [](PyGraph& g, const PyNode& x, const PyNode& w, const Optional& residual,
             const std::string& precision, bool transpose_w) {
            const MatmulAttrs attrs{to_precision(precision), transpose_w};
            return wrap(g, matmul(*g.graph, x.node, w.node, attrs, raw(residual)));
          },
          arg("x"), arg("w"), arg("residual") = kNone, arg("precision") = "fast",
          arg("transpose_w") = false)
      .def(
          "matmul_indexed",
          [](PyGraph& g, const PyNode& x, const PyNode& w, const PyNode& ids,
             const Optional& weights, const Optional& residual, const std::string& precision) {
            return wrap(g, matmul_indexed(*g.graph, x.node, w.node, ids.node,
                                          {to_precision(precision)}, raw(weights), raw(residual)));
          },
          arg("x"), arg("w"), arg("ids"), arg("weights") = kNone, arg("residual") = kNone,
          arg("precision") = "fast")
      .def(
          "swiglu_matmul",
          [](PyGraph& g, const PyNode& x, const PyNode& gate, const PyNode& up, const Optional& ids,
             const std::string& precision) {
            return wrap(g, swiglu_matmul(*g.graph, x.node, gate.node, up.node,
                                         {to_precision(precision)}, raw(ids)));
          },
          arg("x"), arg("gate"), arg("up"), arg("ids") = kNone, arg("precision") = "fast")
      .def(
          "route",
          [](PyGraph& g, const PyNode& logits, const Optional& bias, int n_used,
             const std::string& gating, int n_groups, int n_groups_used,
             const std::string& group_score, bool normalize, float scale) {
            const RouteAttrs attrs{n_used,        to_gating(gating),           n_groups,
                                   n_groups_used, to_group_score(group_score), normalize,
                                   scale};
            const Routing r = route(*g.graph, logits.node, raw(bias), attrs);
            return std::make_pair(wrap(g, r.ids), wrap(g, r.weights));
          },
          arg("logits"), arg("bias").none(true), arg("n_used"), arg("gating") = "softmax",
          arg("n_groups") = 1, arg("n_groups_used") = 1, arg("group_score") = "max",
          arg("normalize") = false, arg("scale") = 1.0f, "-> (ids, weights)")
      .def(
          "top_k",
          [](PyGraph& g, const PyNode& logits, int k) {
            const Choice best = top_k(*g.graph, logits.node, {k});
            return std::make_tuple(wrap(g, best.ids), wrap(g, best.values), wrap(g, best.totals));
          },
          arg("logits"), arg("k"), "-> (ids, values, totals)");
}

void bind_states(py::class_<PyGraph>& graph) {
  graph
      .def(
          "cache_write",
          [](PyGraph& g, const PyNode& cache_latent, const PyNode& cache_rope, const PyNode& latent,
             const PyNode& rope, const PyNode& cells) {
            const CacheNodes written = cache_write(*g.graph, {cache_latent.node, cache_rope.node},
                                                   latent.node, rope.node, cells.node);
            return std::make_pair(wrap(g, written.latent), wrap(g, written.rope));
          },
          arg("cache_latent"), arg("cache_rope"), arg("latent"), arg("rope"), arg("cells"),
          "-> (latent, rope): the cache after the write")
      .def(
          "mla_attention",
          [](PyGraph& g, const PyNode& q_nope, const PyNode& q_rope, const PyNode& cache_latent,
             const PyNode& cache_rope, const PyNode& k_b, const PyNode& v_b, const PyNode& spans,
             const PyNode& block_table, float scale, bool k_b_transposed, int block_cells,
             const std::string& precision, const std::string& contraction) {
            const AttentionAttrs attrs{to_precision(precision), to_contraction(contraction), scale,
                                       k_b_transposed, block_cells};
            return wrap(g, mla_attention(*g.graph, q_nope.node, q_rope.node,
                                         {cache_latent.node, cache_rope.node}, k_b.node, v_b.node,
                                         spans.node, block_table.node, attrs));
          },
          arg("q_nope"), arg("q_rope"), arg("cache_latent"), arg("cache_rope"), arg("k_b"),
          arg("v_b"), arg("spans"), arg("block_table"), arg("scale"), arg("k_b_transposed") = false,
          arg("block_cells") = 64, arg("precision") = "fast", arg("contraction") = "any",
          "contraction: which of them the spans may ask for, any, absorbed or expanded.")
      .def(
          "square_sums",
          [](PyGraph& g, const PyNode& sums, const PyNode& counts, const PyNode& x,
             const Optional& ids) {
            const SquareSums written =
                square_sums(*g.graph, {sums.node, counts.node}, x.node, raw(ids));
            return std::make_pair(wrap(g, written.sums), wrap(g, written.counts));
          },
          arg("sums"), arg("counts"), arg("x"), arg("ids") = kNone,
          "-> (sums, counts): the state after the squares of x were added");
}

}  // namespace

void register_graph(py::module_& m) {
  py::class_<PyNode>(m, "Node", "A value of a graph.")
      .def_property_readonly("op", [](const PyNode& n) { return std::string(op_name(n.node->op)); })
      .def_property_readonly(
          "format", [](const PyNode& n) { return std::string(format_name(n.node->format())); })
      .def_property_readonly("shape", [](const PyNode& n) {
        return std::vector<int64_t>(n.node->shape().dims().begin(), n.node->shape().dims().end());
      });
  py::class_<PyGraph> graph(m, "Graph",
                            "A graph under construction. Builders take and return nodes of this "
                            "graph; operands are documented in csrc/graph/ops.h. They raise "
                            "ShapeError, FormatError, UnsupportedError.");
  graph.def(py::init<>());
  bind_leaves(graph);
  bind_views(graph);
  bind_rows(graph);
  bind_products(graph);
  bind_states(graph);
}

}  // namespace mla::bindings
