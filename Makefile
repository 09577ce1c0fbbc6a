# Everything runs in $(VENV), which is made at first use. `make test` is the whole test run.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc)
ARGS ?=

BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --no-build-isolation

SOURCES := $(shell find csrc python -type f ! -name '*.pyc' ! -name '*.so') CMakeLists.txt pyproject.toml
CXX_FILES := $(shell find csrc tests/selfcheck tests/cuda bench/cuda -name '*.h' -o -name '*.cpp' \
                     -o -name '*.cu' -o -name '*.cuh')
ASAN_TESTS ?= tests/gguf tests/graph tests/test_memory.py tests/test_quant.py tests/ops

# Starts a command on a machine with memory nodes: options as in the target numa, --, the command.
NUMA_LAB_COMMAND ?= numa-lab

.PHONY: all build test numa demo bench format check stubs check-stubs sanitize asan tsan aarch64 \
        aarch64-build cuda-all cuda-programs emulated test-emulated develop dist clean

all: build

# ---- environments -------------------------------------------------------------------------------
$(VENV)/.tools: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))\
	['build-system']['requires'], sep='\n')" > $(VENV)/build-requires.txt
	$(PIP) install --quiet -r $(VENV)/build-requires.txt
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(INSTALL) '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.tools
	$(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	e = p['optional-dependencies']; print(*p['dependencies'], *e['dev'], *e['test'], sep='\n')" \
	> $(VENV)/dev-requires.txt
	$(PIP) install --quiet -r $(VENV)/dev-requires.txt
	touch $@

# ---- for users ----------------------------------------------------------------------------------
build: $(VENV)/.installed

# The test of the kernels' symbols looks at the objects of the build that was installed.
test: build
	MLA_BUILD_DIR="$$(ls -d build/wheel-$$($(BIN)/python -c \
	'import sys; print("cp%d%d" % sys.version_info[:2])')-*)" $(BIN)/python -m pytest $(ARGS)

# Guests with equal nodes, with one that has no CPUs, and with one that has less of everything.
numa: build
	set -e; for guest in "--nodes 2 --cpus 4 --mem 3G" "--nodes 4 --sockets 2 --cpus 4 --mem 3G" \
	"--nodes 4 --cpus 4 --mem 3G" "--nodes 2 --cpus 4,0 --mem 2G,1G" "--nodes 2 --cpus 3,1 --mem 2G,1G"; \
	do echo "== $$guest"; $(NUMA_LAB_COMMAND) $$guest -- \
	$(BIN)/python -m pytest -p no:cacheprovider tests/numa $(ARGS); done

# The bundled model continues Python source.
demo: build
	$(BIN)/mla-backend demo

bench: build
	$(BIN)/python -m bench $(ARGS)

# ---- for developers -----------------------------------------------------------------------------
# An editable install: changes in csrc are compiled at the next import.
develop: $(VENV)/.tools $(VENV)/.dev
	rm -f $(VENV)/.installed
	$(INSTALL) -e '.[dev,test]'

format: $(VENV)/.dev
	$(BIN)/clang-format -i $(CXX_FILES)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(VENV)/.dev
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

stubs: build $(VENV)/.dev
	$(BIN)/python tools/make_stubs.py python/mla_backend/_core.pyi

check-stubs: build $(VENV)/.dev
	$(BIN)/python tools/make_stubs.py --check python/mla_backend/_core.pyi

dist: $(VENV)/.dev
	$(BIN)/python -m build

# ---- other builds -------------------------------------------------------------------------------
PYTHON_HINTS = -DPython_EXECUTABLE=$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)

sanitize: asan tsan

# The interpreter is not instrumented, so the sanitizer is loaded before it; its own leaks at exit
# are not ours. SIGBUS is our handler's business, and its shadow memory exceeds any limit set.
asan: build
	cmake --preset asan $(PYTHON_HINTS)
	cmake --build build/asan
	build/asan/mla_selfcheck
	rm -rf build/asan/site
	mkdir -p build/asan/site
	cp -r python/mla_backend build/asan/site/
	cp build/asan/_core*.so build/asan/site/mla_backend/
	PYTHONPATH=build/asan/site ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest -p no:cacheprovider $(wildcard $(ASAN_TESTS)) \
	--deselect tests/test_memory.py::test_address_space_limit_counts $(ARGS)

# Without randomized addresses: some kernels randomize more than the sanitizer can bear.
tsan: $(VENV)/.tools
	cmake --preset tsan
	cmake --build build/tsan
	setarch -R build/tsan/mla_selfcheck

aarch64-build: $(VENV)/.tools
	cmake --preset aarch64
	cmake --build build/aarch64

aarch64: aarch64-build
	qemu-aarch64 build/aarch64/mla_selfcheck

# ---- CUDA ---------------------------------------------------------------------------------------
# What a wheel would carry: every architecture. Prints how long it took and how large it is.
cuda-all: $(VENV)/.tools
	cmake --preset cuda-all $(PYTHON_HINTS)
	cmake --build build/cuda-all --target mla_core
	start=$$(date +%s); cmake --build build/cuda-all --target _cuda; \
	strip -o build/cuda-all/stripped.so build/cuda-all/_cuda*.so; \
	echo "_cuda for all architectures: $$(($$(date +%s) - start)) s," \
	"$$(stat -c %s build/cuda-all/stripped.so) bytes"

# The programs of tests/cuda on a GPU of this machine.
cuda-programs: $(VENV)/.tools
	cmake --preset cuda $(PYTHON_HINTS)
	cmake --build build/cuda
	set -e; for program in build/cuda/cuda_test_*; do echo "== $$program"; $$program; done

# The same on the CPU, and the module that runs every kernel there. Needs CUDA's headers, no GPU.
emulated: $(VENV)/.tools
	cmake --preset emulated $(PYTHON_HINTS)
	cmake --build build/emulated
	set -e; for program in build/emulated/emulated_test_*; do echo "== $$program"; $$program; done

# Operations on an emulated device: the fewest cases in which every format, layout and option comes
# up. tests/cuda/run.sh runs all of them on a GPU.
test-emulated: build emulated
	MLA_CUDA_EMULATED="$$(ls $(CURDIR)/build/emulated/_cuda_emulated*.so)" \
	$(BIN)/python -m pytest -q --cuda=short $(ARGS)

clean:
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
