// Encoders: rows of float32 -> blocks of every quantized format.
//
//   symmetric formats  x ~ d * s * level(q)     (small blocks: s = 1)
//   affine formats     x ~ d * s * q - dmin * m  (small blocks: x ~ d * q + m)
//
// All minimize sum(importance * (x - decoded)^2): scales of runs are searched over candidates and
// improved by least squares (encode_fit.inc.h), then made into blocks (encode_blocks.inc.h,
// encode_affine.inc.h). Levels are chosen under the rounded scales, so their rounding costs as
// little as can be.
//
// Sixteen runs are encoded at once, lane by lane, and this file is compiled without contraction of
// products: the bytes are the same on every ISA.
#include "backends/cpu/kernels/encode_affine.inc.h"
#include "backends/cpu/kernels/encode_pack.inc.h"

namespace mla::cpu::MLA_ISA {
namespace {

// Grids end where another candidate gains less than a hundredth of the error on normal and on
// heavy-tailed numbers: the more bits, the wider. Where nothing tells elements apart, small blocks
// are searched as long as that costs no more than moving their bytes; under importance, where a
// single number may be all that matters, finely.
template <class Block>
struct Encoder;
template <>
struct Encoder<block::Q4_0> : SmallSymmetric<Integers<-8, Grid{3, 4}, Grid{21, 2}>> {};
template <>
struct Encoder<block::Q5_0> : SmallSymmetric<Integers<-16, Grid{5, 4}, Grid{25, 3}>> {};
template <>
struct Encoder<block::Q8_0> : SmallSymmetric<SignedBytes> {};
template <>
struct Encoder<block::IQ4_NL> : SmallSymmetric<Iq4Levels> {};
template <>
struct Encoder<block::Q4_1> : SmallAffine<15, Grid{1, 0}, Grid{25, 3}> {};
template <>
struct Encoder<block::Q5_1> : SmallAffine<31, Grid{2, 8}, Grid{25, 4}> {};
template <>
struct Encoder<block::Q3_K> : SuperSymmetric<Integers<-4, Grid{9, 3}, Grid{15, 2}>, 16, -32> {};
template <>
struct Encoder<block::Q6_K> : SuperSymmetric<Integers<-32, Grid{9, 7}, Grid{17, 7}>, 16, -128> {};
template <>
struct Encoder<block::IQ4_XS> : SuperSymmetric<Iq4Levels, 8, -32> {};
template <>
struct Encoder<block::Q2_K> : SuperAffine<16, 3, 15, Grid{9, 2}, Grid{15, 2}> {};
template <>
struct Encoder<block::Q4_K> : SuperAffine<8, 15, 63, Grid{9, 3}, Grid{15, 3}> {};
template <>
struct Encoder<block::Q5_K> : SuperAffine<8, 31, 63, Grid{9, 4}, Grid{15, 5}> {};

template <class Block, bool kWeighted>
bool encode_rows(const EncodeRun& run) noexcept {
  using E = Encoder<Block>;
  constexpr int N = E::kElems;
  alignas(64) static constexpr float kAbsent[N] = {};
  Block* out = reinterpret_cast<Block*>(run.out);
  for (int64_t first = 0; first < run.n; first += kRuns * N) {
    Runs<N, E::kGroups, kWeighted> runs;
    const float* x[kRuns];
    const float* importance[kRuns];
    for (int g = 0; g < kRuns; ++g) {
      const int64_t at = first + g * N;
      x[g] = at < run.n ? run.x + at : kAbsent;
      if constexpr (kWeighted) importance[g] = run.importance + (run.column + at) % run.k;
    }
    to_lanes<N>(x, runs.x);
    if constexpr (kWeighted) to_lanes<N>(importance, runs.importance);
    Coded<N> coded;
    if (!normalize(runs) || !E::encode(runs, coded)) return false;
    for (int g = 0; g < kRuns && first + g * N < run.n; g += E::kGroups) {
      pack({coded.q + g * N, coded.s + g, coded.m + g, coded.d[g], coded.dmin[g]}, *out++);
    }
  }
  return true;
}

template <class Block>
bool encode(const EncodeRun& run) noexcept {
  return run.importance != nullptr ? encode_rows<Block, true>(run) : encode_rows<Block, false>(run);
}

}  // namespace

extern const EncodeTable encode_table;
const EncodeTable encode_table = {{
#define MLA_FLOAT(name, gguf, elems, bytes) nullptr,
#define MLA_FORMAT(name, gguf, elems, bytes) encode<block::name>,
#include "quant/formats.def"
    nullptr,  // I32
}};

}  // namespace mla::cpu::MLA_ISA
