"""Sums of squares against float64: formats, views, experts, what was there before, threads."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from latent_cache import Runner, constant, scattered
from mla_backend import _core
from mla_backend.errors import FormatError, ShapeError
from mla_backend.ops import Where
from reference.layouts import LAYOUTS, laid_out
from reference.square_sums import square_sums

Array = npt.NDArray[Any]
Sums = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]

FORMATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SHAPES = [(1, 1), (5, 17), (300, 64), (3, 4100), (2, 7, 33), (2, 3, 5, 16)]


def numbers(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def node_of(g: _core.Graph, x: Array, format: str = "F32") -> _core.Node:
    """An array as a weight, with its strides."""
    base: Array = x
    while isinstance(base.base, np.ndarray):
        base = base.base
    offset = x.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    raw = base.ravel(order="K").view(np.uint8)
    return g.weight("x", _core.Tensor(raw, format, list(x.shape), list(x.strides), offset))


def add(state: Sums, x: Any, where: Where, ids: Array | None = None) -> None:
    """Add the squares of an array, or of the node that a function of the graph makes."""
    runner = Runner(where)
    g = runner.graph
    sums = g.state("sums", _core.Tensor(state[0], "F32", list(state[0].shape)))
    counts = g.state("counts", _core.Tensor(state[1], "I32", list(state[1].shape)))
    node = constant(g, "x", x) if isinstance(x, np.ndarray) else x(g)
    chosen = constant(g, "ids", ids) if ids is not None else None
    written = g.square_sums(sums, counts, node, chosen)
    g.output(written[0])
    runner.run()


def empty(groups: int, n: int) -> Sums:
    return np.zeros((groups, n), np.float32), np.zeros(groups, np.int32)


def check(state: Sums, x: Array, ids: Array | None = None) -> None:
    sums, counts = square_sums(x, ids, len(state[1]))
    np.testing.assert_allclose(state[0], sums, rtol=1e-7)  # one rounding
    np.testing.assert_array_equal(state[1], counts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_layouts_and_shapes(where: Where, format: str, layout: str) -> None:
    for shape in SHAPES:
        x = laid_out(numbers(shape, FORMATS[format]), layout)
        state = empty(int(np.prod(shape[:-2])), shape[-1])
        if min(x.strides) < 0:
            continue  # the core's tensors begin at their lowest byte
        add(state, lambda g, x=x: node_of(g, x, format), where)
        check(state, x)


@pytest.mark.parametrize("per_slot", [True, False])
@pytest.mark.parametrize("place", [constant, scattered])
def test_experts(where: Where, place: Any, per_slot: bool) -> None:
    n_experts = 9
    for n_tokens, n_slots, n in [(1, 1, 5), (40, 3, 2100), (7, 8, 96)]:
        x = numbers((n_tokens, n_slots if per_slot else 1, n))
        # The last expert is never met.
        ids = np.random.default_rng(1).integers(0, n_experts - 1, (n_tokens, n_slots), np.int32)
        state = empty(n_experts, n)
        add(state, lambda g, x=x: place(g, "x", x), where, ids)
        check(state, x, ids)
        assert state[1][-1] == 0
        assert not state[0][-1].any()


def test_sums_go_on(where: Where) -> None:
    state = empty(3, 40)
    parts = [numbers((3, 20, 40), seed=seed) for seed in range(3)]
    for part in parts:
        add(state, part, where)
    sums, counts = square_sums(np.concatenate(parts, axis=1))
    np.testing.assert_allclose(state[0], sums, rtol=3e-7)
    np.testing.assert_array_equal(state[1], counts)


def test_long_sums_keep_small_terms(where: Where) -> None:
    x = np.full((100000, 2), 0.25, np.float32)
    x[0] = 4096  # 2^24: a float32 sum would drop each of the squares that follow
    state = empty(1, 2)
    add(state, x, where)
    assert (state[0] == np.float32(2.0**24 + 99999 / 16)).all()


def test_nothing_to_add(where: Where) -> None:
    state = empty(2, 8)
    add(state, numbers((2, 0, 8)), where)
    none = empty(4, 8)
    add(none, numbers((0, 1, 8)), where, np.zeros((0, 3), np.int32))
    for array in (*state, *none):
        assert not array.any()


def test_threads_change_nothing(isa: str) -> None:
    x = numbers((500, 6, 300))
    ids = np.random.default_rng(3).integers(0, 20, (500, 6), np.int32)
    results = []
    for threads in (1, 2, 5):
        state = empty(20, 300)
        add(state, x, {"isa": isa, "threads": threads}, ids)
        results.append(state[0].tobytes())
    assert results[0] == results[1] == results[2]


def test_messages(where: Where) -> None:
    x = numbers((4, 8))
    with pytest.raises(ShapeError, match=r"sums F32 \[1, 9\] must be \[G, 8\]"):
        add(empty(1, 9), x, where)
    with pytest.raises(ShapeError, match="must have 1 rows, one per matrix of x"):
        add(empty(2, 8), x, where)
    with pytest.raises(ShapeError, match=r"with ids I32 \[4, 2\]"):
        add(empty(2, 8), x, where, np.zeros((4, 2), np.int32))
    with pytest.raises(ShapeError, match=r"ids\[1, 0\] is 7, accepted is 0 to 2"):
        add(empty(3, 8), x[:, None], where, np.array([[0], [7], [1], [1]], np.int32))
    g = _core.Graph()
    sums = g.state("sums", _core.Tensor(np.zeros((1, 8), np.float32), "F32", [1, 8]))
    with pytest.raises(FormatError, match="counts is F32"):
        g.square_sums(sums, sums, constant(g, "x", x))


def test_only_state_is_written() -> None:
    g = _core.Graph()
    x = constant(g, "x", numbers((4, 8)))
    counts = g.state("counts", _core.Tensor(np.zeros(1, np.int32), "I32", [1]))
    with pytest.raises(ShapeError, match="of the kind input, accepted is state"):
        g.square_sums(g.input("sums", "F32", [1, 8]), counts, x)
