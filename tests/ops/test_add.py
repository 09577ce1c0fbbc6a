"""add: exact float32 sums over any strides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_backend import ops
from mla_backend.errors import FormatError, ShapeError
from mla_backend.ops import Where
from reference.layouts import LAYOUTS, laid_out

SHAPES = [(1,), (5,), (3, 16), (2, 17), (2, 3, 31), (2, 1, 3, 65), (2, 5000), (0, 3), (3, 0)]


def numbers(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_shapes(where: Where, layout: str) -> None:
    for shape in SHAPES:
        a, b = numbers(shape), laid_out(numbers(shape, 1), layout)
        np.testing.assert_array_equal(ops.add(a, b, **where), a + b)
        np.testing.assert_array_equal(ops.add(b, a, **where), a + b)


def test_broadcast_views(where: Where) -> None:
    row = np.broadcast_to(numbers((1, 40)), (7, 40))
    column = np.broadcast_to(numbers((7, 1)), (7, 40))
    np.testing.assert_array_equal(ops.add(row, column, **where), row + column)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_special_values(where: Where) -> None:
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3e38, 1e-45, 1], np.float32)
    a, b = np.repeat(special, 8), np.tile(special, 8)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(ops.add(a, b, **where), a + b)


@settings(max_examples=30, deadline=None)
@given(
    isa=st.sampled_from(ops.available_isas()),
    shape=st.lists(st.integers(0, 12), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**32),
    threads=st.integers(1, 4),
)
def test_property(isa: str, shape: Any, seed: int, threads: int) -> None:
    a, b = numbers(shape, seed), numbers(shape[::-1], seed + 1).T
    np.testing.assert_array_equal(ops.add(a, b, isa=isa, threads=threads), a + b)


def test_messages() -> None:
    a = numbers((2, 3))
    with pytest.raises(ShapeError, match=r"add: shapes differ: a F32 \[2, 3\], b F32 \[3\]"):
        ops.add(a, a[0])
    with pytest.raises(FormatError, match="add: b is float64, accepted is float32"):
        ops.add(a, a.astype(np.float64))
