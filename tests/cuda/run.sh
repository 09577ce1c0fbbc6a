#!/usr/bin/env bash
# Builds everything for the GPUs of this machine and runs all tests of CUDA devices there. The last
# screen is the summary; everything else is in build/cuda.
#
# Usage: tests/cuda/run.sh [arguments of pytest]
#
# PYTHON    the interpreter, python3 by default. It needs numpy, pytest, hypothesis, pybind11, typer,
#           rich, tokenizers, jinja2, ml_dtypes, psutil, msgspec and gguf.
# WHEELS    where packages are that the interpreter lacks and the machine cannot fetch: a folder of
#           .whl files, which are unpacked into build/cuda, or one of packages as they are.
# JOBS      tests at a time, 6 by default, where pytest-xdist is installed.
# SANITIZE  tools of compute-sanitizer ("memcheck racecheck initcheck"): the programs and the short
#           list of tests run again under each.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
build=$PWD/build/cuda
mkdir -p "$build"
results=()
failed=no

result() {  # result NAME STATUS SECONDS
  results+=("$(printf '%-44s %s (%d s)' "$1" "$([ "$2" = 0 ] && echo ok || echo "FAILED, status $2")" "$3")")
  [ "$2" = 0 ] || failed=yes
}

run() {  # run NAME LOG COMMAND...
  local name=$1 log=$build/$2 begun=$SECONDS status=0
  shift 2
  timeout "${LIMIT:-1200}" "$@" >"$log" 2>&1 || status=$?
  result "$name" "$status" $((SECONDS - begun))
  return "$status"
}

packages=
if compgen -G "${WHEELS:-}/*.whl" >/dev/null; then
  packages=$build/packages
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$packages" \
    "$WHEELS"/*.whl || exit 1
elif [ -n "${WHEELS:-}" ]; then
  packages=$(realpath "$WHEELS")
fi
export PYTHONPATH=$packages
"$PYTHON" - <<'EOF' || exit 1
import importlib, sys
needed = ("numpy pytest hypothesis pybind11 typer rich tokenizers jinja2 ml_dtypes psutil msgspec gguf")
missing = []
for name in needed.split():
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing.append(f"{name} ({error})")
sys.exit("missing packages: " + ", ".join(missing) + "; see WHEELS" if missing else 0)
EOF

# ---- build --------------------------------------------------------------------------------------
build_all() {
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DMLA_CUDA=on -DMLA_CUDA_TESTS=ON \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
    -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" && ninja -C "$build"
}
export -f build_all
export PYTHON build
if ! run "build" build.log bash -c build_all; then
  tail -n 30 "$build/build.log"
  exit 1
fi
site=$build/site
rm -rf "$site"
mkdir -p "$site/mla_backend"
ln -s "$PWD"/python/mla_backend/* "$site/mla_backend/"
ln -sf "$build"/_core*.so "$build"/_cuda.*.so "$site/mla_backend/"
export PYTHONPATH=$site${packages:+:$packages}

if ! "$PYTHON" -c 'import sys; from mla_backend import devices; sys.exit(devices.cuda_problem() or 0)'; then
  exit 1
fi

# ---- tests --------------------------------------------------------------------------------------
for program in "$build"/cuda_test_*; do
  LIMIT=300 run "$(basename "$program")" "$(basename "$program").log" "$program"
done
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider -W ignore::DeprecationWarning)
split=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then split=(-n "${JOBS:-6}"); fi
run "pytest, all of CUDA" pytest.log "${pytest[@]}" "${split[@]}" tests --cuda=only --durations=5 "$@"
# The short list of operations launches every kernel, which is shown first. Faults are left out: they
# are made on purpose.
if [ -n "${SANITIZE:-}" ]; then
  rm -f "$build/trace"
  for program in "$build"/cuda_test_*; do MLA_CUDA_TRACE=$build/trace "$program" >/dev/null 2>&1; done
  list=("${pytest[@]}" "${split[@]}" -m "not large" tests/ops tests/cuda --cuda=short
    --ignore=tests/cuda/test_device_errors.py --ignore=tests/cuda/test_two_devices.py)
  MLA_CUDA_TRACE=$build/trace run "pytest, the short list" short.log "${list[@]}"
  run "every kernel is launched" coverage.log \
    "$PYTHON" tests/cuda/kernel_coverage.py "$(ls "$build"/_cuda.*.so)" "$build/trace"
fi
for tool in ${SANITIZE:-}; do
  check=(compute-sanitizer --tool "$tool" --error-exitcode 9)
  for program in "$build"/cuda_test_*; do
    [ "$(basename "$program")" = cuda_test_faults ] && continue
    LIMIT=600 run "$tool: $(basename "$program")" "$tool-$(basename "$program").log" \
      "${check[@]}" "$program"
  done
  run "$tool: pytest, the short list" "$tool-pytest.log" \
    "${check[@]}" --target-processes all "${list[@]}"
done

# ---- summary ------------------------------------------------------------------------------------
printf '\n==== summary: commit %s%s\n' "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" \
  "$(git diff --quiet 2>/dev/null || echo ', changed')"
"$PYTHON" -m mla_backend doctor | grep -E '^(driver|cuda|devices|  )' | head -n 8
printf '%s\n' "${results[@]}"
grep -hE '^(FAILED|ERROR)' "$build"/pytest.log | head -n 12
grep -hE '^SKIPPED' "$build"/pytest.log | sed -E 's/^SKIPPED \[[0-9]+\] [^ ]+ //' | cut -c 1-110 |
  sort | uniq -c | sort -rn | head -n 6
tail -n 1 "$build/pytest.log"
for log in "$build"/*check-*.log; do
  if [ -f "$log" ]; then printf '%s: %s\n' "$(basename "$log")" "$(grep 'SUMMARY' "$log" | tail -n 1)"; fi
done
[ "$failed" = no ]
