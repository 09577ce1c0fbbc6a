"""Code of one ISA's kernels stays out of everyone else's.

The linker keeps one copy of every inline function that several objects emit, and it may keep the
one compiled for AVX-512. So the kernels' objects may hold no weak code at all, and export nothing
but their table.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from architecture.tree import ROOT

# nm's letters: weak, vague or unique symbols; and code or data that other objects can see.
WEAK = re.compile(r"^[0-9a-f]* +[VvWwu] (.*)$", re.MULTILINE)
EXPORTED_CODE = re.compile(r"^[0-9a-f]+ +T (.*)$", re.MULTILINE)
UNDEFINED = re.compile(r"^ +U (.*)$", re.MULTILINE)

# What compilers call by themselves, and the C library's functions without a state.
MAY_NEED = re.compile(
    r"mem(?:cpy|set|move|cmp)|_GLOBAL_OFFSET_TABLE_|__stack_chk_fail|mla::cpu::isa_\w+::\w+"
    r"|__(?:asan|ubsan|tsan)_\w+|(?:exp|log|pow|sqrt|ceil|floor|rint|nearbyint)f?"
)


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def object_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("CMakeFiles/mla_kernels_*.dir/**/*.o"))


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The kernels' objects: those of the build that MLA_BUILD_DIR names, else of one made here."""
    named = os.environ.get("MLA_BUILD_DIR")
    if named:
        found = object_files(Path(named))
        assert found, f"MLA_BUILD_DIR={named} has no objects of kernels"
        return found
    build = tmp_path_factory.mktemp("kernels")
    cmake = tool("cmake")
    tool("c++")
    options = ["-DMLA_PYTHON=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run([cmake, "-S", ROOT, "-B", build, *options], check=True, capture_output=True)
    targets = [f"mla_kernels_{isa}" for isa in isas(build)]
    parallel = str(len(os.sched_getaffinity(0)))
    command = [cmake, "--build", build, "--parallel", parallel, "--target", *targets]
    subprocess.run(command, check=True, capture_output=True)
    return object_files(build)


def isas(build: Path) -> list[str]:
    """ISAs that the build has targets for."""
    names = {path.name for path in build.glob("CMakeFiles/mla_kernels_*.dir")}
    return sorted(name.removeprefix("mla_kernels_").removesuffix(".dir") for name in names)


def symbols(path: Path) -> str:
    command = [tool("nm"), "--demangle", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def each(objects: list[Path]) -> Iterator[tuple[str, str]]:
    for path in objects:
        isa = path.parts[path.parts.index("CMakeFiles") + 1]
        yield f"{isa}/{path.name}", symbols(path)


def test_every_isa_is_there(objects: list[Path]) -> None:
    per_isa: dict[str, set[str]] = {}
    for path in objects:
        isa = path.parts[path.parts.index("CMakeFiles") + 1]
        per_isa.setdefault(isa, set()).add(path.name)
    assert "mla_kernels_baseline.dir" in per_isa
    some = per_isa.pop("mla_kernels_avx512amx.dir", set())  # the rest are those of avx512bf16
    assert len({frozenset(names) for names in per_isa.values()}) == 1, per_isa
    assert some <= per_isa["mla_kernels_baseline.dir"]


def test_no_weak_code(objects: list[Path]) -> None:
    wrong = [f"{name}: {hit}" for name, text in each(objects) for hit in WEAK.findall(text)]
    assert not wrong, "\n".join(wrong)


def test_tables_are_the_only_way_in(objects: list[Path]) -> None:
    wrong = [
        f"{name}: {hit}" for name, text in each(objects) for hit in EXPORTED_CODE.findall(text)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_runs_before_main(objects: list[Path]) -> None:
    for name, text in each(objects):
        assert "_GLOBAL__sub_I" not in text, f"{name} has static initialisers"


def test_kernels_call_no_library(objects: list[Path]) -> None:
    wrong = [
        f"{name}: {hit}"
        for name, text in each(objects)
        for hit in UNDEFINED.findall(text)
        if not MAY_NEED.fullmatch(hit)
    ]
    assert not wrong, "\n".join(wrong)
