#!/usr/bin/env bash
# Builds the bench of a decoded token's products for the first GPU of this machine, and runs it.
# Usage: bench/cuda/token.sh [BUILD]: where tests/cuda/run.sh, or cmake --preset cuda, has built.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-build/cuda}
cap=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
if [ "$cap" = 90 ]; then cap=90a; fi
nvcc -std=c++20 -O3 "-gencode=arch=compute_$cap,code=sm_$cap" -Icsrc bench/cuda/token_bench.cu \
  "$build/libmla_cuda.a" "$build/libmla_core.a" -o "$build/token_bench"
"$build/token_bench"
