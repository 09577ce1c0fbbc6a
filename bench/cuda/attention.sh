#!/usr/bin/env bash
# Builds the bench of absorbed attention for the first GPU of this machine, and runs it.
# Usage: bench/cuda/attention.sh [folder for the build]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-$(mktemp -d)}
mkdir -p "$build"
cap=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
if [ "$cap" = 90 ]; then cap=90a; fi
# Functions that the bench does not reach are dropped, with what they would need.
flags=(-std=c++20 -O3 -Xcompiler -ffunction-sections --expt-relaxed-constexpr
  "-gencode=arch=compute_$cap,code=sm_$cap" -Icsrc)
sources=(bench/cuda/attention_bench.cu csrc/backends/cuda/attention_{absorbed,products,batched}.cu
  csrc/backends/cuda/{gemm,gemm_wgmma,dequantize}.cu
  csrc/backends/cuda/{gemm_plan,tensor_map,runtime,problems}.cpp csrc/quant/format.cpp csrc/graph/{graph,tensor}.cpp)
jobs=()
objects=()
for file in "${sources[@]}"; do
  object="$build/$(basename "$file").o"
  nvcc "${flags[@]}" -c "$file" -o "$object" &
  jobs+=($!)
  objects+=("$object")
done
for job in "${jobs[@]}"; do wait "$job"; done
nvcc "${flags[@]}" -Xlinker --gc-sections "${objects[@]}" -o "$build/attention_bench"
timeout 300 "$build/attention_bench" "${@:2}"
