"""Planning and running graphs: memory, borders between backends, inputs, cancelling."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import CancelToken, _core
from mla_backend.errors import (
    CancelledError,
    DeviceError,
    FormatError,
    ShapeError,
    UnsupportedError,
)

Floats = npt.NDArray[np.float32]
RNG = np.random.default_rng(4)
X = RNG.standard_normal((4, 32), dtype=np.float32)


@pytest.fixture
def cpu() -> _core.CpuBackend:
    return _core.CpuBackend(_core.ThreadPool(2))


def add_chain(n: int, width: int = 32) -> _core.Graph:
    """x + x, n times over: 2^n x."""
    g = _core.Graph()
    x = g.input("x", "F32", [4, width])
    for _ in range(n):
        x = g.add(x, x)
    g.output(x)
    return g


def run(graph: _core.Graph, *backends: Any, **inputs: Floats) -> Floats:
    executor = _core.Executor(graph, _core.Workspace(list(backends)))
    executor.run(inputs or {"x": X})
    return np.array(executor.output(0))


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 50])
def test_a_chain_takes_two_places(cpu: _core.CpuBackend, n: int) -> None:
    executor = _core.Executor(add_chain(n), _core.Workspace([cpu]))
    report = executor.report()
    assert report["arena_bytes"] == 2 * X.nbytes
    assert report["unshared_bytes"] == (n + 1) * X.nbytes
    executor.run({"x": X})
    np.testing.assert_array_equal(executor.output(0), X * 2.0**n)


def test_values_are_kept_as_long_as_they_are_read(cpu: _core.CpuBackend) -> None:
    """Random graphs of sums: reuse of memory never shows in the results."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        g = _core.Graph()
        nodes, values = [g.input("x", "F32", [4, 32])], [X.astype(np.float64)]
        for _ in range(25):
            a, b = rng.integers(0, len(nodes), 2)
            if rng.random() < 0.3:  # a view keeps what it looks at
                nodes.append(g.permute(g.reshape(nodes[a], [4, 8, 4]), [0, 2, 1]))
                values.append(values[a].reshape(4, 8, 4).swapaxes(1, 2))
                nodes[-1] = g.reshape(g.copy(nodes[-1], "F32"), [4, 32])
                values[-1] = values[-1].reshape(4, 32)
            else:
                nodes.append(g.rms_norm(g.add(nodes[a], nodes[b])))
                total = values[a] + values[b]
                values.append(total / np.sqrt(np.square(total).mean(-1, keepdims=True) + 1e-6))
        shown = rng.choice(len(nodes), 4, replace=False)
        for index in shown:
            g.output(nodes[index])
        executor = _core.Executor(g, _core.Workspace([cpu]))
        for _ in range(2):
            executor.run({"x": X})
            for i, index in enumerate(shown):
                np.testing.assert_allclose(executor.output(i), values[index], atol=1e-5)


def test_executors_share_a_workspace(cpu: _core.CpuBackend) -> None:
    """It grows to the largest of them, and those planned before follow it."""
    workspace = _core.Workspace([cpu])
    small = _core.Executor(add_chain(1), workspace)
    n_bytes = workspace.n_bytes
    small.run({"x": X})
    kept = small.output(0)
    large = _core.Executor(add_chain(1, 4096), workspace)
    assert workspace.n_bytes > n_bytes
    wide = RNG.standard_normal((4, 4096), dtype=np.float32)
    large.run({"x": wide})
    small.run({"x": 3 * X})
    np.testing.assert_array_equal(small.output(0), 6 * X)
    assert kept.shape == X.shape  # a view of memory that is kept for it


def test_what_a_graph_needs_stays_alive(cpu: _core.CpuBackend) -> None:
    def make() -> _core.Executor:
        g = _core.Graph()
        w = np.full((8, 32), 2.0, np.float32)
        g.output(
            g.matmul(g.input("x", "F32", [4, 32]), g.weight("w", _core.Tensor(w, "F32", [8, 32])))
        )
        return _core.Executor(g, _core.Workspace([_core.CpuBackend(_core.ThreadPool(2))]))

    executor = make()
    gc.collect()
    executor.run({"x": X})
    output = executor.output(0)
    del executor
    gc.collect()
    np.testing.assert_allclose(output, 2 * X.sum(axis=1, keepdims=True).repeat(8, 1), rtol=0.02)


def test_outputs_may_be_inputs_views_and_doubles(cpu: _core.CpuBackend) -> None:
    g = _core.Graph()
    x = g.input("x", "F32", [4, 32])
    y = g.add(x, x)
    for node in (x, g.slice(y, 1, 3, 5), y, y):
        g.output(node)
    executor = _core.Executor(g, _core.Workspace([cpu]))
    executor.run({"x": X})
    for i, want in enumerate((X, 2 * X[:, 3:5], 2 * X, 2 * X)):
        np.testing.assert_array_equal(executor.output(i), want)
    with pytest.raises(ShapeError, match="output 4 of 4"):
        executor.output(4)


# ---- backends ------------------------------------------------------------------------------------


def mixed() -> _core.Graph:
    g = _core.Graph()
    x = g.input("x", "F32", [4, 32])
    y = g.rms_norm(g.add(x, x))
    z = g.softmax(g.add(y, x))
    g.output(g.add(g.softmax(z), y))
    return g


@pytest.mark.parametrize(
    ("ops", "n_steps", "n_copies"),
    [
        (set(), 0, 0),
        ({"add"}, 3, 6),
        ({"rms_norm"}, 1, 2),
        ({"add", "rms_norm", "softmax"}, 6, 2),
    ],
)
def test_borders(cpu: _core.CpuBackend, ops: set[str], n_steps: int, n_copies: int) -> None:
    """One copy for each value that has to cross, and each of them once."""
    subset = _core.SubsetBackend(cpu, ops)
    executor = _core.Executor(mixed(), _core.Workspace([subset, cpu]))
    report = executor.report()
    assert report["n_copies"] == n_copies
    assert sum(name == "subset" for op, name in report["steps"] if op != "hop") == n_steps
    executor.run({"x": X})
    assert subset.n_steps == n_steps
    np.testing.assert_array_equal(executor.output(0), run(mixed(), cpu))


def test_the_first_backend_that_can_is_taken(cpu: _core.CpuBackend) -> None:
    subset = _core.SubsetBackend(cpu, {"add"})
    run(mixed(), cpu, subset)
    assert subset.n_steps == 0


def test_weights_are_carried_over_once(cpu: _core.CpuBackend) -> None:
    w = RNG.standard_normal((64, 32), dtype=np.float32)
    g = _core.Graph()
    weight = g.weight("w", _core.Tensor(w, "F32", [64, 32]))
    part = g.slice(g.permute(weight, [1, 0]), 1, 3, 35)  # a strided view [32, 32]
    g.output(g.matmul(g.input("x", "F32", [4, 32]), part, precision="exact"))
    subset = _core.SubsetBackend(cpu, {"matmul"})
    np.testing.assert_allclose(run(g, subset, cpu), X @ w.T[:, 3:35].T, atol=1e-4)


def test_state_is_not_carried_over(cpu: _core.CpuBackend) -> None:
    """What writes memory that outlives the run goes where that memory is."""
    latent, rope = np.zeros((8, 32), np.float32), np.zeros((8, 32), np.float32)
    g = _core.Graph()
    x, cells = g.input("x", "F32", [4, 32]), g.input("cells", "I32", [4])
    states = [g.state(n, _core.Tensor(m, "F32", [8, 32])) for n, m in (("a", latent), ("b", rope))]
    g.output(g.cache_write(*states, g.add(x, x), x, cells)[0])
    subset = _core.SubsetBackend(cpu, {"add", "cache_write"})
    executor = _core.Executor(g, _core.Workspace([subset, cpu]))
    assert ("cache_write", "cpu") in executor.report()["steps"]
    executor.run({"x": X, "cells": np.array([1, 3, 5, 7], np.int32)})
    np.testing.assert_array_equal(latent[1::2], 2 * X)
    np.testing.assert_array_equal(rope[1::2], X)


def test_unsupported_node_is_an_error_when_planned(cpu: _core.CpuBackend) -> None:
    apart = _core.Tensor(np.zeros((8, 32, 2), np.float32), "F32", [8, 32], [256, 8])
    g = _core.Graph()
    x, cells = g.input("x", "F32", [4, 32]), g.input("cells", "I32", [4])
    g.output(g.cache_write(g.state("a", apart), g.state("b", apart), x, x, cells)[0])
    subset = _core.SubsetBackend(cpu, {"add"})
    message = r"no backend supports cache_write\(F32 \[8, 32\].*I32 \[4\].*\(subset: .*; cpu: "
    with pytest.raises(UnsupportedError, match=message):
        _core.Executor(g, _core.Workspace([subset, cpu]))


def test_a_backend_with_host_memory_is_needed(cpu: _core.CpuBackend) -> None:
    with pytest.raises(UnsupportedError, match="no backend uses host memory"):
        _core.Workspace([_core.SubsetBackend(cpu, {"add"})])
    with pytest.raises(UnsupportedError):
        _core.Workspace([])


def test_unknown_isa(cpu: _core.CpuBackend) -> None:
    with pytest.raises(UnsupportedError, match="sse9"):
        _core.CpuBackend(_core.ThreadPool(1), "sse9")
    assert cpu.isa == _core.available_isas()[0]


def several_inputs() -> tuple[_core.Graph, dict[str, Floats]]:
    """Sums of a, c, d and e, where b is for a softmax."""
    g = _core.Graph()
    shapes = {"a": [4, 32], "b": [1, 5], "c": [1, 32], "d": [4, 1], "e": [4, 32]}
    given = {name: RNG.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    node = {name: g.input(name, "F32", shape) for name, shape in shapes.items()}
    wide = {name: g.broadcast(node[name], [4, 32]) for name in "acde"}
    total = g.add(g.add(wide["d"], wide["a"]), wide["c"])
    g.output(g.softmax(node["b"]))
    g.output(g.add(total, wide["e"]))
    return g, given


@pytest.mark.parametrize(("ops", "n_copies"), [({"add"}, 2 + 1), ({"add", "softmax"}, 1 + 2)])
def test_inputs_side_by_side_go_as_one(cpu: _core.CpuBackend, ops: set[str], n_copies: int) -> None:
    """What stays on the host parts them; with nothing between there is one copy."""
    graph, given = several_inputs()
    executor = _core.Executor(graph, _core.Workspace([_core.SubsetBackend(cpu, ops), cpu]))
    assert executor.report()["n_copies"] == n_copies
    plain = _core.Executor(graph, _core.Workspace([cpu]))
    for sign in (1, -1):
        inputs = {name: sign * value for name, value in given.items()}
        executor.run(inputs)
        plain.run(inputs)
        for i in range(2):
            np.testing.assert_array_equal(executor.output(i), plain.output(i))


def test_empty_inputs_travel_along(cpu: _core.CpuBackend) -> None:
    g = _core.Graph()
    nodes = [g.input(name, "F32", [rows, 32]) for name, rows in (("a", 2), ("b", 0), ("c", 2))]
    for node in nodes:
        g.output(g.add(node, node))
    executor = _core.Executor(g, _core.Workspace([_core.SubsetBackend(cpu, {"add"}), cpu]))
    executor.run({"a": X[:2], "b": X[:0], "c": X[2:]})
    for i, want in enumerate((X[:2], X[:0], X[2:])):
        np.testing.assert_array_equal(executor.output(i), 2 * want)


# ---- outputs on demand ---------------------------------------------------------------------------


def test_an_output_on_demand_is_copied_when_read(cpu: _core.CpuBackend) -> None:
    g = _core.Graph()
    x = g.input("x", "F32", [4, 32])
    y = g.add(x, x)
    z = g.rms_norm(y)
    for _ in range(5):  # what would take its place, were it not kept
        z = g.rms_norm(g.add(z, z))
    g.output(y, on_demand=True)
    g.output(g.slice(y, 1, 3, 5), on_demand=True)
    g.output(z)
    g.output(x, on_demand=True)
    workspace = _core.Workspace([_core.SubsetBackend(cpu, {"add", "rms_norm"}), cpu])
    executor = _core.Executor(g, workspace)
    assert executor.report()["n_copies"] == 2  # x there, z back
    for sign in (1, -1):
        executor.run({"x": sign * X})
        np.testing.assert_array_equal(executor.output(1), 2 * sign * X[:, 3:5])
        for _ in range(2):
            np.testing.assert_array_equal(executor.output(0), 2 * sign * X)
        np.testing.assert_array_equal(executor.output(3), sign * X)
    other = _core.Executor(add_chain(1), workspace)
    other.run({"x": X})
    with pytest.raises(DeviceError, match="output 0: its values are not there"):
        executor.output(0)


def test_what_comes_to_the_host_anyway_is_not_copied_twice(cpu: _core.CpuBackend) -> None:
    g = _core.Graph()
    x = g.input("x", "F32", [4, 32])
    y = g.add(x, x)
    g.output(y, on_demand=True)
    g.output(y)
    executor = _core.Executor(g, _core.Workspace([_core.SubsetBackend(cpu, {"add"}), cpu]))
    assert executor.report()["n_copies"] == 2
    executor.run({"x": X})
    np.testing.assert_array_equal(executor.output(0), 2 * X)
    np.testing.assert_array_equal(executor.output(1), 2 * X)


def test_an_output_on_demand_stays_where_the_host_has_read_it(cpu: _core.CpuBackend) -> None:
    g = _core.Graph()
    x = g.input("x", "F32", [4, 32])
    y = g.add(x, x)
    z = g.rms_norm(y)  # on the host, which then has y
    for _ in range(4):  # what would take its place, were it not kept
        z = g.rms_norm(z)
    g.output(y, on_demand=True)
    g.output(z)
    executor = _core.Executor(g, _core.Workspace([_core.SubsetBackend(cpu, {"add"}), cpu]))
    executor.run({"x": X})
    np.testing.assert_array_equal(executor.output(0), 2 * X)


# ---- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({}, ShapeError, "0 inputs came|'x' is missing"),
        ({"x": X, "y": X}, ShapeError, "'y'|no input"),
        ({"x": X[:3]}, ShapeError, r"'x': F32 \[3, 32\] came, accepted is F32 \[4, 32\]"),
        ({"x": X.astype(np.int32)}, ShapeError, "I32"),
        ({"x": X.astype(np.float64)}, FormatError, "float64 came"),
        ({"x": np.asfortranarray(X)}, ShapeError, "C-contiguous"),
    ],
)
def test_wrong_inputs(
    cpu: _core.CpuBackend, inputs: dict[str, Any], error: type[Exception], message: str
) -> None:
    executor = _core.Executor(add_chain(1), _core.Workspace([cpu]))
    with pytest.raises(error, match=message):
        executor.run(inputs)
    executor.run({"x": X})
    np.testing.assert_array_equal(executor.output(0), 2 * X)


# ---- cancelling ----------------------------------------------------------------------------------


def slow_graph(n: int = 40) -> tuple[_core.Graph, Floats]:
    """A row of products, each of which takes milliseconds on one thread."""
    w = np.eye(640, dtype=np.float32)
    g = _core.Graph()
    x = g.input("x", "F32", [512, 640])
    weight = g.weight("w", _core.Tensor(w, "F32", [640, 640]))
    y = x
    for _ in range(n):
        y = g.matmul(y, weight, precision="exact")
    g.output(y)
    return g, RNG.standard_normal((512, 640), dtype=np.float32)


def test_token_is_honoured_before_and_within_a_run() -> None:
    graph, x = slow_graph()
    cpu = _core.CpuBackend(_core.ThreadPool(1))
    executor = _core.Executor(graph, _core.Workspace([cpu]))
    cancel = CancelToken()
    assert not cancel.cancelled
    cancel.cancel()
    assert cancel.cancelled
    with pytest.raises(CancelledError):
        executor.run({"x": x}, cancel)
    cancel.reset()
    timer = threading.Timer(0.05, cancel.cancel)
    timer.start()
    began = time.monotonic()
    with pytest.raises(CancelledError):
        executor.run({"x": x}, cancel)
    until_stop = time.monotonic() - began
    timer.join()
    began = time.monotonic()
    executor.run({"x": x})
    whole = time.monotonic() - began
    assert until_stop < 0.05 + whole / 4
    np.testing.assert_array_equal(executor.output(0), x)
