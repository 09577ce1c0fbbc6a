// The kernels of a weight format: instantiations/*.cu, one file each.
#pragma once

#include "backends/cuda/matvec.h"
#include "backends/cuda/small_batch.h"

namespace mla::cuda {

struct ExactRun {
  Finish finish = Finish::store;
  bool waits_last = false;  // see Overlap
  bool fours = false;       // x and w may be read four neighbours at a time
  int split = 1;            // warps that divide k
  int n_row_tiles = 1;      // of each matrix
};

struct ProductKernels {
  void (*exact_one)(Product, ExactRun) = nullptr;   // one row and one column a warp
  void (*exact_many)(Product, ExactRun) = nullptr;  // kExactRows rows and `columns` columns
  int columns = 1;
  void (*exact_across)(Product, Finish) = nullptr;  // null for plain formats

  void (*small_batch[4])(SmallBatch) = {};  // for 1, 2, 4, 8 tiles of 8 rows of x; null: none
  void (*stage_rows)(StageRows) = nullptr;
  RowLayout layout{};
  int w_unit_bytes = 0;  // of a warp's 16 rows, in shared memory
  int x_unit_bytes = 0;  // of a row of x, likewise
  int unit = 0;          // of k

  MatVecKernel matvec;
};

const ProductKernels& product_kernels(Format format);

inline constexpr int kExactWarps = 8;
inline constexpr int kExactThreads = 32 * kExactWarps;
// Rows and columns of a warp where there are many rows: 12 loads of 16 bytes feed 128 multiply-adds
// a lane, and 32 sums leave room for them within 128 registers.
inline constexpr int kExactRows = 8;
inline constexpr int kExactColumns = 4;

}  // namespace mla::cuda
