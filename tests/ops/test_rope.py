"""rope against float64: layouts, far and negative positions, threads, messages."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_backend import ops
from mla_backend.errors import FormatError, ShapeError
from mla_backend.ops import Where
from reference.errors import assert_ulps
from reference.layouts import LAYOUTS, laid_out
from reference.rope import rope

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
SHAPES = [(1, 2), (5, 64), (3, 1, 2), (2, 5, 6), (4, 3, 64), (1, 2, 34), (2, 1, 66)]
ULPS = 3  # of the pair's length: cosine, sine, and the two products


def numbers(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def frequencies(width: int, base: float = 10000.0) -> Any:
    return (base ** -(np.arange(0, width, 2) / width)).astype(np.float32)


def check(got: Any, x: Any, positions: Any, freqs: Any, scale: float = 1.0) -> None:
    pairs = x.astype(np.float64).reshape(*x.shape[:-1], -1, 2)
    length = np.repeat(np.hypot(pairs[..., 0], pairs[..., 1]), 2, axis=-1) * abs(scale)
    assert_ulps(got, rope(x, positions, freqs, scale), ULPS, length)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_shapes(where: Where, dtype: Any, layout: str) -> None:
    for shape in SHAPES:
        x = laid_out(numbers(shape, dtype), layout)
        positions = laid_out(np.arange(7, 7 + shape[0], dtype=np.int32), layout)
        freqs = laid_out(frequencies(shape[-1]), layout)
        check(ops.rope(x, positions, freqs, scale=1.3, **where), x, positions, freqs, 1.3)
        check(ops.rope(x, positions, **where), x, positions, freqs)


@pytest.mark.parametrize("far", [10**6, 163840, 2**31 - 100])
def test_far_and_negative_positions(where: Where, far: int) -> None:
    ends = np.arange(far - 50, far, dtype=np.int32)
    positions = np.concatenate([ends, -ends, np.array([0, -1, 1, -(2**31)])]).astype(np.int32)
    x = numbers((len(positions), 2, 64))
    freqs = frequencies(64)
    check(ops.rope(x, positions, freqs, **where), x, positions, freqs)


def test_quarter_turns(where: Where) -> None:
    """Angles at the multiples of pi/4, where the reduction changes its branch."""
    x = numbers((4000, 2))
    positions = np.arange(-2000, 2000, dtype=np.int32)
    for step in (np.pi / 4, np.nextafter(np.pi / 4, 0), np.pi / 2):
        freqs = np.array([step], np.float32)
        check(ops.rope(x, positions, freqs, **where), x, positions, freqs)


def test_position_zero_is_the_identity(where: Where) -> None:
    x = numbers((3, 2, 8))
    np.testing.assert_array_equal(ops.rope(x, np.zeros(3, np.int32), **where), x)


def test_back_and_forth(where: Where) -> None:
    x = numbers((5, 2, 64))
    positions = np.array([1, 100, 4096, 163839, 10**6], np.int32)
    back = ops.rope(ops.rope(x, positions, **where), -positions, **where)
    np.testing.assert_allclose(back, x, atol=1e-6)


def test_empty(where: Where) -> None:
    for shape in ((0, 3, 8), (2, 0, 8), (2, 3, 0), (0, 8)):
        positions = np.zeros(shape[0], np.int32)
        assert ops.rope(np.zeros(shape, np.float32), positions, **where).shape == shape


def test_threads_change_nothing(isa: str) -> None:
    x = numbers((200, 16, 64))
    positions = np.arange(200, dtype=np.int32)
    results = [ops.rope(x, positions, isa=isa, threads=n).tobytes() for n in (1, 2, 5)]
    assert results[0] == results[1] == results[2]


@settings(max_examples=30, deadline=None)
@given(
    isa=st.sampled_from(ops.available_isas()),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40).map(lambda n: 2 * n)),
    base=st.floats(2, 1e7),
    start=st.integers(-(10**6), 10**6),
    seed=st.integers(0, 2**32),
)
def test_property(isa: str, shape: Any, base: float, start: int, seed: int) -> None:
    x = numbers(shape, seed=seed)
    positions = np.arange(start, start + shape[0], dtype=np.int32)
    freqs = frequencies(shape[2], base)
    check(ops.rope(x, positions, freqs, isa=isa, threads=1), x, positions, freqs)


def test_messages() -> None:
    x = numbers((2, 3, 8))
    two = np.zeros(2, np.int32)
    with pytest.raises(ShapeError, match=r"positions I32 \[3\] must be \[2\]"):
        ops.rope(x, np.zeros(3, np.int32))
    with pytest.raises(ShapeError, match=r"frequencies F32 \[3\] must be half of the rows of x"):
        ops.rope(x, two, np.ones(3, np.float32))
    with pytest.raises(ShapeError, match="half of the rows"):
        ops.rope(x[..., :7], two)
    with pytest.raises(FormatError, match="positions is int64, accepted is"):
        ops.rope(x, np.zeros(2, np.int64))
    with pytest.raises(FormatError, match=r"positions is F32 \[2\], accepted is I32"):
        ops.rope(x, np.zeros(2, np.float32))
    with pytest.raises(ShapeError, match=r"must be \[T, H, R\] or \[T, R\]"):
        ops.rope(x[None], np.zeros(1, np.int32))
