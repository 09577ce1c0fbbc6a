"""The source tree as the architecture tests see it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "mla_backend"

CXX_SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".def"}
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def cxx_files(*directories: Path) -> list[Path]:
    tops = directories or (CSRC,)
    return sorted(path for top in tops for path in top.rglob("*") if path.suffix in CXX_SUFFIXES)


def python_files(*directories: Path) -> list[Path]:
    return sorted(path for top in directories or (PACKAGE,) for path in top.rglob("*.py"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def includes(path: Path) -> list[str]:
    """Paths that a C++ file includes with quotes, relative to csrc."""
    return _INCLUDE.findall(path.read_text())


def layer_of_cxx(path: str) -> str:
    """``backends/cpu/ops/ops.h`` belongs to ``backends/cpu``, ``base/half.h`` to ``base``."""
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == "backends" else parts[0]


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file of it imports, as paths: ``gguf.reader``, ``_core``.

    Names imported from the package itself count as modules: ``from mla_backend import _core``.
    """
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    package = ("mla_backend", *parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            names = (
                [f"{module}.{alias.name}" for alias in node.names]
                if module == "mla_backend"
                else [module]
            )
        else:
            continue
        found |= {
            name.removeprefix("mla_backend.")
            for name in names
            if name.split(".")[0] == "mla_backend"
        }
    return found


@dataclass(frozen=True)
class Span:
    """Lines of a function, and where it is."""

    path: Path
    line: int
    name: str
    n_lines: int

    def __str__(self) -> str:
        return f"{shown(self.path)}:{self.line} {self.name}: {self.n_lines} lines"


def python_functions(path: Path) -> Iterator[Span]:
    """Functions with their lines, docstrings left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            has_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            text = (first.end_lineno or 0) - first.lineno + 1 if has_text else 0
            lines = (node.end_lineno or 0) - node.lineno + 1 - text
            yield Span(path, node.lineno, node.name, lines)


def without_comments(source: str) -> str:
    """C++ with comments and the insides of literals blanked, line by line as before."""
    token = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)
    return token.sub(lambda match: "\n" * match.group().count("\n"), source)


# A head ends in a parameter list, perhaps with qualifiers, initialisers or a return type.
_FUNCTION_HEAD = re.compile(r"\)\s*(?:const|noexcept|override|final|&|:.*|->.*|\s)*$", re.DOTALL)
_CONTROL = re.compile(r"^\s*(?:\}\s*)?(?:if|for|while|switch|else|do|catch|try|return|extern)\b")


def cxx_functions(path: Path) -> Iterator[Span]:
    """Outermost function bodies, found by their braces at namespace or class level."""
    source = without_comments(path.read_text())
    source = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", "", source, flags=re.MULTILINE)
    opened: list[tuple[str, int]] = []  # (head, line) of every open brace
    head = ""
    line = 1
    inside: int | None = None  # depth of the function being in
    for char in source:
        line += char == "\n"
        if char == "{":
            opened.append((head.strip(), line))
            is_function = _FUNCTION_HEAD.search(head) and not _CONTROL.match(head)
            if inside is None and is_function:
                inside = len(opened)
            head = ""
        elif char == "}" and opened:
            text, first = opened.pop()
            if inside == len(opened) + 1:
                inside = None
                name = re.sub(r"\s+", " ", text.split("(")[0]).split(" ")[-1]
                yield Span(path, first, name, line - first + 1)
            head = ""
        elif char == ";":
            head = ""
        else:
            head += char
