#!/usr/bin/env bash
# Builds the tests and the bench of the products for the first GPU of this machine, and runs them.
# Usage: bench/cuda/gemm.sh [folder for the build]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-$(mktemp -d)}
mkdir -p "$build"
cap=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
if [ "$cap" = 90 ]; then cap=90a; fi
flags=(-std=c++20 -O3 --expt-relaxed-constexpr "-gencode=arch=compute_$cap,code=sm_$cap"
  -Icsrc -Itests/cuda)
sources=(csrc/backends/cuda/{gemm,gemm_wgmma,dequantize,expert_sort}.cu
  csrc/backends/cuda/{gemm_plan,tensor_map,packed,runtime}.cpp
  csrc/quant/format.cpp csrc/graph/{graph,tensor}.cpp)
programs=(tests/cuda/test_gemm.cu tests/cuda/test_dequantize.cu bench/cuda/gemm_bench.cu)
jobs=()
objects=()
for file in "${sources[@]}" "${programs[@]}"; do
  object="$build/$(basename "$file").o"
  nvcc "${flags[@]}" -c "$file" -o "$object" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
for file in "${sources[@]}"; do objects+=("$build/$(basename "$file").o"); done
for file in "${programs[@]}"; do
  name=$(basename "$file" .cu)
  nvcc "${flags[@]}" "$build/$name.cu.o" "${objects[@]}" -o "$build/$name"
done
status=0
for name in test_gemm test_dequantize gemm_bench; do
  echo "== $name"
  timeout 240 "$build/$name" || { echo "== $name: exit status $?"; status=1; }
done
exit $status
