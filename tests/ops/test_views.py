"""Views of graph nodes: operations read and compose them without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mla_backend import _core, ops
from mla_backend.errors import FormatError, ShapeError, UnsupportedError, UsageError
from reference.errors import assert_ulps
from reference.rms_norm import rms_norm
from reference.rope import rope
from reference.softmax import softmax


class Case:
    """A graph with one input x [T, H, D], run at once."""

    def __init__(self, x: Any, isa: str) -> None:
        self.x = x
        self.graph = _core.Graph()
        self.node = self.graph.input("x", "F32", list(x.shape))
        self.workspace = _core.Workspace([_core.CpuBackend(_core.ThreadPool(2), isa)])

    def run(self, out: _core.Node) -> tuple[Any, list[str]]:
        """The value, and the names of the operations that were run."""
        self.graph.output(out)
        executor = _core.Executor(self.graph, self.workspace)
        executor.run({"x": self.x})
        report = executor.report()
        assert report["n_copies"] == 0
        return executor.output(0), [name for name, _ in report["steps"]]


@pytest.fixture
def case(isa: str) -> Case:
    x = np.random.default_rng(0).normal(size=(6, 4, 24)).astype(np.float32)
    return Case(x, isa)


def test_norm_of_a_slice(case: Case) -> None:
    """The latent part of a projection is normalized where it lies."""
    part = case.graph.slice(case.node, 2, 0, 17)
    out, steps = case.run(case.graph.rms_norm(part))
    assert_ulps(out, rms_norm(case.x[..., :17], None, 1e-6), 4)
    assert steps == ["rms_norm"]


def test_rope_of_a_slice(case: Case) -> None:
    """The rope part of the heads is rotated where it lies."""
    positions = np.arange(100, 106, dtype=np.int32)
    frequencies = np.array([1, 0.1, 0.01], np.float32)
    part = case.graph.slice(case.node, 2, 18, 24)
    p = case.graph.weight("p", _core.Tensor(positions, "I32", [6]))
    f = case.graph.weight("f", _core.Tensor(frequencies, "F32", [3]))
    out, steps = case.run(case.graph.rope(part, p, f))
    want = rope(case.x[..., 18:], positions, frequencies, 1.0)
    np.testing.assert_allclose(out, want, atol=1e-6)
    assert steps == ["rope"]


def test_permuted_softmax(case: Case) -> None:
    """Along a dim that is not the innermost in memory."""
    turned = case.graph.permute(case.node, [2, 1, 0])
    out, steps = case.run(case.graph.softmax(turned))
    want = softmax(case.x.transpose(2, 1, 0), None, 1.0)
    np.testing.assert_allclose(out, want, rtol=2e-6)
    assert steps == ["softmax"]


def test_views_of_views(case: Case) -> None:
    g = case.graph
    halves = g.reshape(case.node, [6, 4, 2, 12])
    second = g.slice(halves, 2, 1, 2)
    column = g.slice(g.permute(second, [1, 2, 0, 3]), 3, 5, 6)
    wide = g.broadcast(column, [4, 1, 6, 9])
    out, steps = case.run(g.add(wide, wide))
    view = case.x.reshape(6, 4, 2, 12)[:, :, 1:2].transpose(1, 2, 0, 3)[..., 5:6]
    np.testing.assert_array_equal(out, np.broadcast_to(2 * view, (4, 1, 6, 9)))
    assert steps == ["add"]


def test_views_of_results(case: Case) -> None:
    g = case.graph
    gate_up = g.reshape(g.add(case.node, case.node), [24, 24])
    out, steps = case.run(g.swiglu(g.slice(gate_up, 1, 0, 12), g.slice(gate_up, 1, 12, 24)))
    both = 2 * case.x.reshape(24, 24).astype(np.float64)
    gate, up = both[:, :12], both[:, 12:]
    np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=1e-6)
    assert steps == ["add", "swiglu"]


def test_views_that_would_need_a_copy_are_refused(case: Case) -> None:
    g = case.graph
    with pytest.raises(ShapeError, match="would need a copy"):
        g.reshape(g.permute(case.node, [1, 0, 2]), [24, 24])
    with pytest.raises(ShapeError, match="number of elements differs"):
        g.reshape(case.node, [5, 5])
    with pytest.raises(ShapeError, match=r"slice: \[2, 9\) of axis 1"):
        g.slice(case.node, 1, 2, 9)
    with pytest.raises(ShapeError, match="no permutation"):
        g.permute(case.node, [0, 0, 1])
    with pytest.raises(ShapeError, match="only extents of 1 grow"):
        g.broadcast(case.node, [12, 4, 24])


def test_options_that_are_refused() -> None:
    x = np.zeros(3, np.float32)
    with pytest.raises(UnsupportedError, match="ISA 'sse9' is unknown; available here: "):
        ops.copy(x, isa="sse9")
    with pytest.raises(UsageError, match="copy: threads is 0, accepted is 1 or more"):
        ops.copy(x, threads=0)
    with pytest.raises(UnsupportedError, match="copy: backend 'tpu', accepted is cpu"):
        ops.copy(x, backend="tpu")
    with pytest.raises(FormatError, match="copy: x is complex64, accepted is float32"):
        ops.copy(x.astype(np.complex64))


def test_results_outlive_later_calls() -> None:
    first = ops.add(np.ones(5, np.float32), np.ones(5, np.float32))
    ops.add(np.zeros(5, np.float32), np.zeros(5, np.float32))
    assert first.tolist() == [2] * 5
