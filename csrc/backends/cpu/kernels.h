// The tables that each ISA's object library exports. Kernels take pointers, strides and ranges;
// they trust them: they never allocate, throw or start threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "quant/format.h"

namespace mla::cpu {

// ---- matmul ---------------------------------------------------------------------------------
// How the activations of a product are stored before it, chosen by weight format and precision.
enum class Packing : uint8_t { f32, bf16, q8 };

// Packing::f32 rows are padded with zeros to a multiple of this: the widest register.
inline constexpr int64_t kPackedFloats = 16;
// Columns of a weight that `across` takes at a time: whole blocks of every format.
inline constexpr int64_t kAcrossColumns = 256;

// One tile of work: output columns [n_begin, n_end) (rows of w) for n_x packed activation rows.
struct MatmulTile {
  const std::byte* w;   // row 0 of the weight
  int64_t w_row_bytes;  // stride between its rows
  int64_t n_begin, n_end;
  int64_t k;
  const std::byte* const* x;  // [n_x] packed rows
  float* const* y;            // [n_x] output rows; y[i][n] is written (or added to)
  int n_x;
  bool accumulate;            // add to y instead of writing
  std::byte* room = nullptr;  // a thread's own, 64-byte aligned; only slabs need one
};
using MatmulKernel = void (*)(const MatmulTile&) noexcept;

// A row of activations of any float format and element stride -> packed_bytes(packing, k).
using PackRow = void (*)(const std::byte* x, Format format, int64_t stride_bytes, int64_t k,
                         std::byte* out) noexcept;
struct MatmulEntry {
  Packing packing;
  MatmulKernel kernel;
};
struct MatmulTable {
  // [format][precision]; kernel == nullptr where there is none.
  MatmulEntry rows[kFormatCount][2];
  // w [K, N] contracted across its rows: w row r meets x element r. n_begin is a multiple of
  // kAcrossColumns; x rows are Packing::f32, but need no padding.
  MatmulKernel across[kFormatCount];
  PackRow pack[3];  // by Packing
  size_t (*packed_bytes)(Packing, int64_t k) noexcept;
  // Row of any weight format -> float32, n_elems a multiple of the block.
  void (*decode)(Format, const std::byte* row, int64_t n_elems, float* out) noexcept;
};

// For many rows of x, in fast precision: kSlabGranule rows of w at a time are unpacked to the
// thread's room and meet all of them. Worth it from kSlabMinRows rows of x on: up to there
// unpacking costs more than it saves.
inline constexpr int64_t kSlabGranule = 32;
inline constexpr int64_t kSlabMinRows = 8;
inline constexpr int64_t kSlabMaxRows = 512;  // rows of x in one tile of work
struct SlabEntry {
  MatmulKernel kernel;  // null where there is none
  PackRow pack;         // to packed_bytes(k)
  size_t (*packed_bytes)(int64_t k) noexcept;
};
struct SlabTable {
  SlabEntry rows[kFormatCount];
  size_t room_bytes;  // MatmulTile::room
};

// ---- row-wise ops ---------------------------------------------------------------------------
// x, out: rows of n float32 elements, contiguous but for to_f32; out may not overlap the inputs,
// but for add and swiglu, where it may be one of them.
// Errors are in kernels/row.inc.cpp.
struct RowTable {
  // Any float format and element stride -> float32; float32 -> any float format, contiguous.
  void (*to_f32)(const std::byte* x, Format, int64_t stride_bytes, int64_t n, float* out) noexcept;
  void (*from_f32)(const float* x, int64_t n, Format, std::byte* out) noexcept;
  void (*add)(const float* a, const float* b, int64_t n, float* out) noexcept;
  // weight may be null. A row of zeros gives zeros, even with eps == 0.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out) noexcept;
  // cosine[i], sine[i] = those of position * frequencies[i], times scale; angles up to 2^31.
  void (*rotation)(int32_t position, const float* frequencies, float scale, int64_t n,
                   float* cosine, float* sine) noexcept;
  // out[2i], out[2i+1] = rotation of x[2i], x[2i+1] by (cosine[i], sine[i]); n is even.
  void (*rope)(const float* x, const float* cosine, const float* sine, int64_t n,
               float* out) noexcept;
  // softmax(scale * x + mask); mask may be null; a row that is -inf throughout gives zeros.
  void (*softmax)(const float* x, const float* mask, float scale, int64_t n, float* out) noexcept;
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out) noexcept;
  void (*sigmoid)(const float* x, int64_t n, float* out) noexcept;
  void (*encode_q8_0)(const float* x, int64_t n, std::byte* out) noexcept;  // cache rows
  void (*add_squares)(const float* x, int64_t n, double* sums) noexcept;    // sums[i] += x[i]^2
  double (*exp_sum)(const float* x, float shift, int64_t n) noexcept;       // of e^(x[i] - shift)
};

// ---- attention ------------------------------------------------------------------------------
// Rows of q against a run of keys, with running softmax. See kernels/attention.inc.cpp.
struct AttentionTable;

// ---- encoders -------------------------------------------------------------------------------
// Elements [column, column + n) of rows with k elements each, counted on over the ends of rows:
// n and column are whole blocks.
struct EncodeRun {
  const float* x;  // [n]
  int64_t n;
  const float* importance;  // [k], positive; null: all elements count alike
  int64_t k, column;
  std::byte* out;
};
// False where an element is not finite or a scale exceeds binary16; out is then incomplete.
using EncodeKernel = bool (*)(const EncodeRun&) noexcept;
struct EncodeTable {
  EncodeKernel blocks[kFormatCount];  // null where the format is not quantized
};

// ---- limits ---------------------------------------------------------------------------------
// Multiply-adds in registers: n_steps times n_ops operations, two per multiply-add. seed is 0.
// See kernels/probe.inc.cpp.
struct MultiplyProbe {
  uint32_t (*run)(int64_t n_steps, uint32_t seed) noexcept;  // null where the ISA has no unit
  int64_t n_ops;
};
struct ProbeTable {
  uint32_t (*read)(const std::byte* data, int64_t n_bytes) noexcept;
  MultiplyProbe f32, int8, bf16;
};

struct KernelTable {
  std::string_view isa;
  const MatmulTable* matmul;
  const SlabTable* slab;
  const RowTable* row;
  const AttentionTable* attention;
  const EncodeTable* encode;
  const ProbeTable* probe;
};

}  // namespace mla::cpu
