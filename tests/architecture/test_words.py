"""What must not be written in the sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from architecture.tree import CSRC, PACKAGE, ROOT, cxx_files, python_files, shown, without_comments

# Assembled, so that a search of the tree for one of them does not end here.
MODELS = re.compile(
    "|".join(("deep" + "seek", "ki" + "mi", "moon" + "light", "giga" + "chat")), re.I
)
OPEN_ENDS = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX|HA" + r"CK)\b")

BUILD_FILES = ["CMakeLists.txt", "CMakePresets.json", "Makefile", "pyproject.toml"]


def lines_with(pattern: re.Pattern[str], path: Path, text: str | None = None) -> list[str]:
    lines = (path.read_text() if text is None else text).splitlines()
    return [
        f"{shown(path)}:{i + 1}: {line}" for i, line in enumerate(lines) if pattern.search(line)
    ]


def all_sources() -> list[Path]:
    around = [ROOT / "tests", ROOT / "bench"]
    files = [*cxx_files(), *cxx_files(*around), *python_files(), *python_files(*around)]
    return [*files, *(ROOT / name for name in BUILD_FILES)]


def test_no_model_is_named_in_csrc() -> None:
    found = [hit for path in cxx_files() for hit in lines_with(MODELS, path)]
    assert not found, "\n".join(found)


def test_nothing_is_left_open() -> None:
    found = [hit for path in all_sources() for hit in lines_with(OPEN_ENDS, path)]
    assert not found, "\n".join(found)


def test_builds_are_portable() -> None:
    # Assumes nothing about the machine that compiles: it need not be the one that runs.
    pattern = re.compile(r"-m(?:arch|tune|cpu)" + r"=native")
    files = [ROOT / name for name in BUILD_FILES] + sorted((ROOT / "cmake").glob("*"))
    found = [hit for path in files for hit in lines_with(pattern, path)]
    assert not found, "\n".join(found)


FORBIDDEN_CXX = re.compile(
    r"\bstd::(?:cout|cerr|clog|abort|exit|quick_exit|terminate)\b"
    r"|(?<![\w:.>])(?:printf|puts|putchar|perror|abort|exit|_exit|assert)\s*\("
    r"|\bf(?:printf|puts)\s*\("
)


def test_core_neither_prints_nor_ends_the_process() -> None:
    found = [
        hit
        for path in cxx_files()
        for hit in lines_with(FORBIDDEN_CXX, path, without_comments(path.read_text()))
    ]
    assert not found, "\n".join(found)


def test_exceptions_are_caught_by_name() -> None:
    # The terminal's face reports every error in one place; bindings hand exceptions over.
    pattern = re.compile(r"\bcatch\s*\(\s*\.\.\.\s*\)")
    found = [
        hit
        for path in cxx_files()
        for hit in lines_with(pattern, path, without_comments(path.read_text()))
        if "bindings" not in path.parts
    ]
    assert not found, "\n".join(found)


def test_backends_are_told_apart_inside_backends_only() -> None:
    pattern = re.compile(r'name\(\)\s*[!=]=\s*"|if\s*\(?\s*backend\s*==')
    files = [path for path in cxx_files() if "backends" not in path.relative_to(CSRC).parts]
    files += python_files()
    found = [hit for path in files for hit in lines_with(pattern, path)]
    assert not found, "\n".join(found)


def is_terminal_face(path: Path) -> bool:
    return path.relative_to(PACKAGE).parts[0] in {"cli.py", "__main__.py", "commands"}


@pytest.mark.parametrize("path", python_files(), ids=shown)
def test_library_neither_prints_nor_swallows(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{shown(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"
            only_passes = all(isinstance(line, ast.Pass) for line in node.body)
            broad = isinstance(node.type, ast.Name) and node.type.id in {
                "Exception",
                "BaseException",
            }
            assert not (broad and only_passes), f"{where}: swallows every error"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "breakpoint"}, f"{where}: {node.func.id}()"
            ends = node.func.id in {"exit", "quit"}
            assert not ends or is_terminal_face(path), f"{where}: {node.func.id}()"
