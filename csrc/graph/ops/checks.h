// Operand checks shared by the shape rules; each message says op, operand, what came, what is
// accepted.
#pragma once

#include <algorithm>

#include "base/error.h"
#include "graph/node.h"

namespace mla {

inline bool is_float_format(Format f) {
  return f == Format::F32 || f == Format::F16 || f == Format::BF16;
}
inline bool is_weight_format(Format f) { return f != Format::I32; }

inline void check_format(const char* op, const char* operand, const Node* x, bool ok,
                         const char* accepted) {
  MLA_CHECK(FormatError, ok, op, ": ", operand, " is ", x->layout, ", accepted is ", accepted);
}
inline void check_float(const char* op, const char* operand, const Node* x) {
  check_format(op, operand, x, is_float_format(x->format()), "F32, F16 or BF16");
}
inline void check_f32(const char* op, const char* operand, const Node* x) {
  check_format(op, operand, x, x->format() == Format::F32, "F32");
}
inline void check_i32(const char* op, const char* operand, const Node* x) {
  check_format(op, operand, x, x->format() == Format::I32, "I32");
}

}  // namespace mla
