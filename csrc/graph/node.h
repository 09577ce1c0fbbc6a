// The operations and one node of a graph: what is computed from what, with which layout.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "graph/tensor.h"

namespace mla {

enum class Op : uint8_t {
#define MLA_OP(name) name,
#include "graph/ops.def"
};
inline constexpr int kOpCount = 0
#define MLA_OP(name) +1
#include "graph/ops.def"
    ;
std::string_view op_name(Op op);

// fast: activations are rounded to 8 bits or bf16 where the weight's kernel wants that.
// exact: activations stay float32, weights are decoded in registers.
enum class Precision : uint8_t { fast, exact };

struct MatmulAttrs {
  Precision precision = Precision::fast;
  // false: w [.., N, K], contracted along its rows. true: w [.., K, N], contracted across them.
  bool transpose_w = false;
};
struct RmsNormAttrs {
  float eps = 1e-6f;
};
struct RopeAttrs {
  float scale = 1.0f;  // multiplies sine and cosine (YaRN's attention factor)
};
struct SoftmaxAttrs {
  float scale = 1.0f;
};
enum class Gating : uint8_t { softmax, sigmoid };
enum class GroupScore : uint8_t { max, top2_sum };
struct RouteAttrs {
  int n_used = 1;
  Gating gating = Gating::softmax;
  int n_groups = 1;       // groups of consecutive experts
  int n_groups_used = 1;  // experts outside the best groups are never chosen
  GroupScore group_score = GroupScore::max;
  bool normalize = false;  // weights of the chosen experts sum to 1 before scaling
  float scale = 1.0f;
};
inline constexpr int kMaxTopK = 256;
struct TopKAttrs {
  int k = 1;  // at most kMaxTopK
};
// What the spans of a graph may ask for: a promise, which spares a device work it cannot foresee.
enum class Contraction : uint8_t { any, absorbed, expanded };
struct AttentionAttrs {
  Precision precision = Precision::fast;
  Contraction contraction = Contraction::any;
  float scale = 1.0f;           // multiplies q.k before the softmax
  bool k_b_transposed = false;  // false: k_b [H, C, N] (split layout); true: [H, N, C] (legacy)
  int block_cells = 64;         // cells per entry of the block table
};
using Attrs = std::variant<std::monostate, MatmulAttrs, RmsNormAttrs, RopeAttrs, SoftmaxAttrs,
                           RouteAttrs, TopKAttrs, AttentionAttrs>;

struct Node {
  Op op = Op::input;
  int id = 0;         // position in the graph, which is the order of execution
  std::string label;  // weight or input name; for messages
  Layout layout;
  std::vector<Node*> inputs;  // nullptr where an optional operand is absent
  Attrs attrs;
  std::byte* constant = nullptr;   // Op::weight and Op::state: memory that exists before the run
  const Slices* slices = nullptr;  // of the constant, where it is kept in parts
  const void* home = nullptr;      // Op::state: the backend whose memory that is; null: the host
  std::string device;              // name of the backend that should compute it; "": the first
  Node* source = nullptr;          // Op::view: whose memory this is ...
  int64_t offset_bytes = 0;        // ... and where in it

  int64_t dim(int i) const { return layout.dim(i); }
  const Shape& shape() const { return layout.shape; }
  Format format() const { return layout.format; }
  // inputs.size() may be shorter than the op's optional operands.
  Node* input(size_t i) const { return i < inputs.size() ? inputs[i] : nullptr; }
  bool is_leaf() const { return op == Op::input || op == Op::weight || op == Op::state; }
  template <class T>
  const T& attr() const {
    return std::get<T>(attrs);
  }
};

// The node whose memory `node` lives in, and the offset there.
struct Root {
  Node* node;
  int64_t offset_bytes;
};
Root root_of(Node* node);

// Whether its memory is that of a weight kept in parts, so that plain strides do not lead to it.
bool is_in_parts(const Node* node);

// "matmul(F32 [2, 8], Q4_K [16, 8])": for messages.
std::string describe(const Node& node);

}  // namespace mla
