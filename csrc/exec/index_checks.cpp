#include "exec/index_checks.h"

#include <limits>

#include "base/error.h"

namespace mla {
namespace {

[[noreturn]] void refuse(const IndexCheck& check, const Tensor& at, int64_t i, int64_t j,
                         int64_t value) {
  const auto op = op_name(check.node->op);
  if (check.node->op == Op::cache_write) {
    throw ShapeError(
        concat(op, ": cells[", j, "] is ", value, ", the cache has ", check.high + 1, " cells"));
  }
  const std::string where = at.shape.rank > 1 ? concat(i, ", ", j) : concat(j);
  throw ShapeError(concat(op, ": ids[", where, "] is ", value, ", accepted is 0 to ", check.high));
}

}  // namespace

IndexCheck index_check_of(const Node& node) {
  switch (node.op) {
    case Op::get_rows:
      return {&node, node.input(1), 0, node.input(0)->dim(0) - 1};
    case Op::matmul_indexed:
      return {&node, node.input(2), 0, node.input(1)->dim(0) - 1};
    case Op::swiglu_matmul:
      return {&node, node.input(3), 0, node.input(1)->dim(0) - 1};
    case Op::cache_write:  // negative: not written
      return {&node, node.input(4), std::numeric_limits<int32_t>::min(), node.input(0)->dim(0) - 1};
    default:
      return {};
  }
}

void check_indices(const IndexCheck& check, const Tensor& indices) {
  for (int64_t i = 0; i < indices.shape.extent[2]; ++i) {
    for (int64_t j = 0; j < indices.shape.extent[3]; ++j) {
      const int64_t value =
          *reinterpret_cast<const int32_t*>(indices.at(0, 0, i) + j * indices.stride[3]);
      if (value < check.low || value > check.high) refuse(check, indices, i, j, value);
    }
  }
}

}  // namespace mla
