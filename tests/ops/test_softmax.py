"""softmax against float64: layouts, masks, infinities, threads, messages."""

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
from reference.softmax import logits, softmax

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
SHAPES = [(1,), (5,), (3, 16), (2, 17), (2, 3, 31), (2, 1, 3, 65), (4, 300)]


def numbers(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Any:
    return (3 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def check(got: Any, x: Any, mask: Any, scale: float) -> None:
    """e^z turns the absolute error of z, a rounding of its size, into a relative one."""
    z = logits(x, mask, scale)
    largest = np.max(np.abs(z), axis=-1, keepdims=True, where=np.isfinite(z), initial=0)
    ulps = np.broadcast_to(4 + 2 * largest, z.shape)
    assert_ulps(got, softmax(x, mask, scale), ulps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_shapes(where: Where, dtype: Any, layout: str) -> None:
    for shape in SHAPES:
        x = laid_out(numbers(shape, dtype), layout)
        mask = laid_out(numbers(shape, seed=1), layout)
        check(ops.softmax(x, **where), x, None, 1.0)
        check(ops.softmax(x, mask, 0.37, **where), x, mask, 0.37)


@pytest.mark.parametrize(
    "mask_shape", [(2, 3, 4, 33), (4, 33), (1, 33), (33,), (1,), (2, 1, 4, 1), (3, 1, 33)]
)
def test_masks_broadcast(where: Where, mask_shape: tuple[int, ...]) -> None:
    x = numbers((2, 3, 4, 33))
    mask = laid_out(numbers(mask_shape, seed=1), "permuted")
    check(ops.softmax(x, mask, 0.5, **where), x, mask, 0.5)


def test_causal_mask(where: Where) -> None:
    x = numbers((5, 50, 50))
    mask = np.where(np.tri(50, dtype=bool), 0, -np.inf).astype(np.float32)
    out = ops.softmax(x, mask, 0.2, **where)
    check(out, x, mask, 0.2)
    assert not out[:, ~np.tri(50, dtype=bool)].any()


def test_all_masked_rows_are_zeros(where: Where) -> None:
    x = numbers((3, 21))
    mask = np.zeros((3, 1), np.float32)
    mask[1] = -np.inf
    out = ops.softmax(x, mask, **where)
    check(out, x, mask, 1.0)
    assert not out[1].any()


def test_nan_is_not_hidden(where: Where) -> None:
    x = np.full((2, 19), -np.inf, np.float32)
    x[0, 18] = np.nan
    x[1, 4] = 0
    out = ops.softmax(x, **where)
    assert np.isnan(out[0]).all()
    np.testing.assert_array_equal(out[1], np.eye(19, dtype=np.float32)[4])


def test_wide_range(where: Where) -> None:
    """Down to the subnormals, and without overflow at 3e38."""
    x = np.array([[0, -50, -87, -100, -103, -104, -110, -1e30]], np.float32)
    out = ops.softmax(x, **where)
    np.testing.assert_allclose(out, softmax(x, None, 1.0), rtol=2e-7, atol=2**-149)
    assert (ops.softmax(np.full((2, 7), 3e38, np.float32), **where) == np.float32(1 / 7)).all()


def test_long_rows(where: Where) -> None:
    x = np.zeros((1, 129280), np.float32)
    np.testing.assert_allclose(ops.softmax(x, **where), 1 / 129280, rtol=2e-7)
    x = numbers((1, 129280))
    check(ops.softmax(x, **where), x, None, 1.0)


def test_empty(where: Where) -> None:
    for shape in ((0,), (0, 4), (4, 0)):
        assert ops.softmax(np.zeros(shape, np.float32), **where).shape == shape


def test_threads_change_nothing(isa: str) -> None:
    x = laid_out(numbers((300, 777)), "permuted")
    mask = numbers((777,), seed=1)
    results = [ops.softmax(x, mask, isa=isa, threads=n).tobytes() for n in (1, 2, 5)]
    assert results[0] == results[1] == results[2]


@settings(max_examples=30, deadline=None)
@given(
    isa=st.sampled_from(ops.available_isas()),
    rows=st.integers(1, 5),
    width=st.integers(1, 200),
    scale=st.floats(-3, 3, width=32),
    hidden=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_property(isa: str, rows: int, width: int, scale: float, hidden: float, seed: int) -> None:
    x = numbers((rows, width), seed=seed)
    masked = np.random.default_rng(seed).uniform(size=(rows, width)) < hidden
    mask = np.where(masked, -np.inf, 0).astype(np.float32)
    out = ops.softmax(x, mask, scale, isa=isa, threads=1)
    check(out, x, mask, scale)
    sums = out.sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(sums[~masked.all(axis=1)], 1, atol=1e-6)


def test_messages() -> None:
    x = numbers((2, 8))
    with pytest.raises(ShapeError, match="only extents of 1 grow"):
        ops.softmax(x, numbers((3, 8)))
    with pytest.raises(FormatError, match="mask is F16"):
        ops.softmax(x, numbers((2, 8), np.float16))
    with pytest.raises(ShapeError, match="loses dims"):
        ops.softmax(x, numbers((1, 2, 8)))
