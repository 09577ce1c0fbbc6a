#!/usr/bin/env bash
# Builds the test and the bench of expanded attention for the first GPU of this machine, and runs
# them. Usage: bench/cuda/expanded.sh [folder for the build]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-$(mktemp -d)}
mkdir -p "$build"
cap=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
if [ "$cap" = 90 ]; then cap=90a; fi
flags=(-std=c++20 -O3 --expt-relaxed-constexpr "-gencode=arch=compute_$cap,code=sm_$cap"
  -Icsrc -Itests/cuda)
cuda=csrc/backends/cuda
sources=($cuda/{gemm,gemm_wgmma,dequantize,attention_exact,attention_absorbed,attention_products}.cu
  $cuda/ops/mla_attention.cu $cuda/{gemm_plan,tensor_map,packed,runtime}.cpp
  csrc/quant/format.cpp csrc/graph/{graph,tensor,ops/attention}.cpp)
# The bench includes the source that the test links.
programs=(tests/cuda/test_expanded.cu bench/cuda/expanded_bench.cu)
extra=($cuda/attention_expanded.cu)
jobs=()
objects=()
for file in "${sources[@]}" "${programs[@]}" "${extra[@]}"; do
  nvcc "${flags[@]}" -c "$file" -o "$build/$(basename "$file").o" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
for file in "${sources[@]}"; do objects+=("$build/$(basename "$file").o"); done
nvcc "${flags[@]}" "$build"/{test_expanded,attention_expanded}.cu.o "${objects[@]}" \
  -o "$build/test_expanded"
nvcc "${flags[@]}" "$build/expanded_bench.cu.o" "${objects[@]}" -o "$build/expanded_bench"
status=0
for name in test_expanded expanded_bench; do
  echo "== $name"
  timeout 240 "$build/$name" || { echo "== $name: exit status $?"; status=1; }
done
exit $status
