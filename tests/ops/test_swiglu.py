"""swiglu against float64: layouts, mixed dtypes, the whole range of the gate, threads."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_backend import ops
from mla_backend.errors import ShapeError
from mla_backend.ops import Where
from reference.errors import assert_ulps
from reference.layouts import LAYOUTS, laid_out
from reference.swiglu import swiglu

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
SHAPES = [(1,), (5,), (3, 16), (2, 17), (2, 3, 31), (2, 1, 3, 65), (2, 4500)]
ULPS = 5  # e^x, the sum, the quotient, two products


def numbers(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Any:
    return (4 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_shapes(where: Where, dtype: Any, layout: str) -> None:
    for shape in SHAPES:
        gate = laid_out(numbers(shape, dtype), layout)
        up = laid_out(numbers(shape, seed=1), layout)
        assert_ulps(ops.swiglu(gate, up, **where), swiglu(gate, up), ULPS)
        assert_ulps(ops.swiglu(up, gate, **where), swiglu(up, gate), ULPS)


def test_whole_range(where: Where) -> None:
    gate = np.linspace(-87, 100, 100001, dtype=np.float32)
    one = np.ones_like(gate)
    assert_ulps(ops.swiglu(gate, one, **where), swiglu(gate, one), ULPS)


def test_ends_of_the_range(where: Where) -> None:
    gate = np.array([-1e38, -1e4, -200, -104, -100, 0, -0.0, 200, 1e38, np.inf], np.float32)
    got = ops.swiglu(gate, np.ones_like(gate), **where)
    want = np.array([0, 0, 0, 0, -100 * np.exp(-100.0), 0, 0, 200, 1e38, np.inf])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-41)
    assert np.isnan(ops.swiglu(gate[:1] * np.float32(np.nan), gate[:1], **where)).all()


def test_empty(where: Where) -> None:
    none = np.zeros((3, 0), np.float32)
    assert ops.swiglu(none, none, **where).shape == (3, 0)


def test_threads_change_nothing(isa: str) -> None:
    gate = numbers((3, 100000))
    results = [ops.swiglu(gate, gate, isa=isa, threads=n).tobytes() for n in (1, 2, 5)]
    assert results[0] == results[1] == results[2]


@settings(max_examples=30, deadline=None)
@given(
    isa=st.sampled_from(ops.available_isas()),
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    seed=st.integers(0, 2**32),
)
def test_property(isa: str, shape: Any, layouts: tuple[str, str], seed: int) -> None:
    gate = laid_out(numbers(shape, seed=seed), layouts[0])
    up = laid_out(numbers(shape, seed=seed + 1), layouts[1])
    assert_ulps(ops.swiglu(gate, up, isa=isa, threads=1), swiglu(gate, up), ULPS)


def test_messages() -> None:
    with pytest.raises(ShapeError, match=r"shapes differ: gate F32 \[2, 3\], up F32 \[3, 2\]"):
        ops.swiglu(numbers((2, 3)), numbers((3, 2)))
