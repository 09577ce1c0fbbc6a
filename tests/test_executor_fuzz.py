"""Random graphs against NumPy: views of views, empty extents, inputs declared late, borders."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import _core
from mla_backend.errors import ShapeError

F64 = npt.NDArray[np.float64]
OPS = ["copy", "add", "rms_norm", "softmax", "swiglu", "matmul"]
MAX_ELEMS = 6000


class RandomGraph:
    """A graph and the float64 values of its nodes, grown step by step."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.graph = _core.Graph()
        self.inputs: dict[str, npt.NDArray[np.float32]] = {}
        self.keep: list[Any] = []
        self.values: list[tuple[_core.Node, F64]] = []
        self.add_leaf()

    def grow(self, n_steps: int) -> None:
        for _ in range(n_steps):
            steps = (self.add_leaf, self.add_view, self.add_op)
            steps[self.rng.choice(3, p=[0.1, 0.5, 0.4])]()

    def pick(self) -> tuple[_core.Node, F64]:
        return self.values[self.rng.integers(len(self.values))]

    def shape(self) -> list[int]:
        rank = self.rng.integers(1, 5)
        return [
            int(n) for n in self.rng.choice([0, 1, 2, 3, 5, 8, 17], rank, p=[0.03] + 6 * [0.97 / 6])
        ]

    def add_leaf(self) -> None:
        shape = self.shape()
        x = self.rng.standard_normal(shape).astype(np.float32)
        if self.rng.random() < 0.5:
            name = f"x{len(self.inputs)}"
            self.inputs[name] = x
            node = self.graph.input(name, "F32", shape)
        else:  # every other element of the last axis, the first axis backwards
            wide = np.zeros([*shape[:-1], 2 * shape[-1]], np.float32)
            wide[..., ::2] = x[::-1]
            strides = [-wide.strides[0], *wide.strides[1:-1], 8] if len(shape) > 1 else [-8]
            steps = max(shape[0] - 1, 0)
            if len(shape) == 1:
                wide = np.repeat(x[::-1], 2)
            tensor = _core.Tensor(wide, "F32", shape, strides, -strides[0] * steps if x.size else 0)
            self.keep.append(wide)
            node = self.graph.weight("w", tensor)
        self.values.append((node, x.astype(np.float64)))

    def add_view(self) -> None:
        node, value = self.pick()
        kind = self.rng.integers(4)
        if kind == 0:
            axes = [int(a) for a in self.rng.permutation(value.ndim)]
            self.values.append((self.graph.permute(node, axes), value.transpose(axes)))
        elif kind == 1:
            axis = int(self.rng.integers(value.ndim))
            begin, end = (int(n) for n in sorted(self.rng.integers(0, value.shape[axis] + 1, 2)))
            part = (slice(None),) * axis + (slice(begin, end),)
            self.values.append((self.graph.slice(node, axis, begin, end), value[part]))
        elif kind == 2:
            self.add_reshape(node, value)
        else:
            shape = [int(self.rng.integers(1, 4)) if n == 1 else n for n in value.shape]
            shape = [int(self.rng.integers(1, 4))] * (value.ndim < 4) + shape
            if np.prod(shape) <= MAX_ELEMS:
                wide = np.broadcast_to(value, shape)
                self.values.append((self.graph.broadcast(node, shape), wide))

    def add_reshape(self, node: _core.Node, value: F64) -> None:
        """Two neighbours become one, or one is cut in two, where strides can say that."""
        shape = list(value.shape)
        axis = int(self.rng.integers(len(shape)))
        if axis + 1 < len(shape):
            shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
        elif len(shape) < 4 and shape[axis] % 2 == 0:
            shape[axis : axis + 1] = [2, shape[axis] // 2]
        try:
            self.values.append((self.graph.reshape(node, shape), value.reshape(shape)))
        except ShapeError:
            assert value.size, "empty values take any shape"

    def add_op(self) -> None:
        (a, x), (b, y) = self.pick(), self.pick()
        op = self.rng.choice(OPS)
        if op in ("add", "swiglu") and x.shape != y.shape:
            b, y = a, x
        if op == "copy":
            self.values.append((self.graph.copy(a, "F32"), x))
        elif op == "add":
            self.values.append((self.graph.add(a, b), x + y))
        elif op == "rms_norm":
            mean = np.square(x).mean(-1, keepdims=True) if x.shape[-1] else 0.0
            self.values.append((self.graph.rms_norm(a, eps=0.1), x / np.sqrt(mean + 0.1)))
        elif op == "softmax":
            e = np.exp(x - x.max(-1, keepdims=True)) if x.shape[-1] else x
            self.values.append((self.graph.softmax(a), e / e.sum(-1, keepdims=True)))
        elif op == "swiglu":
            self.values.append((self.graph.swiglu(a, b), x / (1 + np.exp(-x)) * y))
        elif x.ndim >= 2:
            self.add_product(a, x)

    def add_product(self, a: _core.Node, x: F64) -> None:
        """With the transpose of itself or with a view of it; scaled, so that nothing explodes."""
        axes = [*range(x.ndim - 2), x.ndim - 1, x.ndim - 2]
        across = bool(self.rng.random() < 0.5)
        w = self.graph.permute(a, axes) if across else a
        out = self.graph.matmul(a, w, precision="exact", transpose_w=across)
        self.values.append((self.graph.rms_norm(out, eps=1.0), normed(x @ x.swapaxes(-1, -2))))


def normed(x: F64) -> F64:
    mean = np.square(x).mean(-1, keepdims=True) if x.shape[-1] else 0.0
    return np.asarray(x / np.sqrt(mean + 1.0))


def check(case: RandomGraph, workspace: _core.Workspace) -> None:
    shown = case.rng.integers(0, len(case.values), 5)
    for index in shown:
        case.graph.output(case.values[index][0])
    executor = _core.Executor(case.graph, workspace)
    for _ in range(2):
        executor.run(case.inputs)
        for i, index in enumerate(shown):
            want = case.values[index][1]
            out = executor.output(i)
            assert out.shape == want.shape
            np.testing.assert_allclose(
                out, want, rtol=1e-3, atol=1e-4 * (1 + abs(want).max(initial=0))
            )


@pytest.mark.parametrize("isa", _core.available_isas())
def test_random_graphs(isa: str) -> None:
    """In one workspace, which all of them share and make grow."""
    workspace = _core.Workspace([_core.CpuBackend(_core.ThreadPool(3), isa)])
    for seed in range(60):
        case = RandomGraph(seed)
        case.grow(25)
        check(case, workspace)


@pytest.mark.parametrize("n_ops", [1, 2, 3, 5])
def test_random_graphs_across_borders(n_ops: int) -> None:
    cpu = _core.CpuBackend(_core.ThreadPool(2))
    for seed in range(30):
        case = RandomGraph(1000 * n_ops + seed)
        case.grow(25)
        pick = case.rng.permutation(OPS)
        first = _core.SubsetBackend(cpu, set(pick[:n_ops]))
        second = _core.SubsetBackend(cpu, set(pick[n_ops:]))
        check(case, _core.Workspace([first, second, cpu]))
