"""Files and functions stay small enough to read."""

from __future__ import annotations

from pathlib import Path

from architecture.tree import (
    CSRC,
    ROOT,
    cxx_files,
    cxx_functions,
    python_files,
    python_functions,
    shown,
)

FILE_LINES = 600
FUNCTION_LINES = 60
KERNEL_LINES = 120

WHERE = [ROOT / name for name in ("python", "tests", "bench")]


def is_kernel(path: Path) -> bool:
    backend = next((top for top in path.parents if top.parent == CSRC / "backends"), None)
    return backend is not None and path.is_relative_to(backend / "kernels")


def test_files() -> None:
    files = cxx_files() + cxx_files(ROOT / "tests", ROOT / "bench") + python_files(*WHERE)
    too_long = []
    for path in files:
        n_lines = len(path.read_text().splitlines())
        if n_lines > FILE_LINES:
            too_long.append(f"{shown(path)}: {n_lines} lines")
    assert not too_long, "\n".join(too_long)


def test_python_functions() -> None:
    spans = [span for path in python_files(*WHERE) for span in python_functions(path)]
    assert len(spans) > 100
    too_long = [str(span) for span in spans if span.n_lines > FUNCTION_LINES]
    assert not too_long, "\n".join(too_long)


def test_cxx_functions() -> None:
    spans = [span for path in cxx_files() for span in cxx_functions(path)]
    assert len(spans) > 100
    too_long = [
        str(span)
        for span in spans
        if span.n_lines > (KERNEL_LINES if is_kernel(span.path) else FUNCTION_LINES)
    ]
    assert not too_long, "\n".join(too_long)


def test_functions_are_found(tmp_path: Path) -> None:
    source = tmp_path / "sample.cpp"
    source.write_text(
        """// void commented() {
#define BODY(x) { \\
  x }
namespace {
struct Thing : Base {
  Thing() : a_(1), b_{2} { if (true) { } }
  int size() const noexcept override {
    const char* text = "}";
    return '}';
  }
};
template <class T>
auto outer(T x)
    -> int {
  auto inner = [&](int y) { return y; };
  for (;;) {
  }
}
}  // namespace
"""
    )
    found = {(span.name, span.n_lines) for span in cxx_functions(source)}
    assert found >= {("size", 4), ("outer", 5)}
    assert not {name for name, _ in found} & {"commented", "BODY", "inner"}
