"""rms_norm against float64: layouts, dtypes, extreme magnitudes, threads, messages."""

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
from reference.rms_norm import rms_norm

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
SHAPES = [(1,), (5,), (3, 16), (2, 17), (1, 1), (2, 3, 31), (2, 1, 3, 129), (4, 512)]
ULPS = 4  # the factor, two products and their roundings


def numbers(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_shapes(where: Where, dtype: Any, layout: str) -> None:
    for shape in SHAPES:
        x = laid_out(numbers(shape, dtype), layout)
        weight = laid_out(numbers(shape[-1:], seed=1), layout)
        assert_ulps(ops.rms_norm(x, weight, **where), rms_norm(x, weight, 1e-6), ULPS)
        assert_ulps(ops.rms_norm(x, eps=0.5, **where), rms_norm(x, None, 0.5), ULPS)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 5)])
def test_nothing_to_do(where: Where, shape: tuple[int, ...]) -> None:
    assert ops.rms_norm(np.zeros(shape, np.float32), **where).shape == shape


@pytest.mark.parametrize("magnitude", [1e-44, 1e-39, 1e-25, 1e19, 1e30, 3e38])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_extreme_magnitudes(where: Where, magnitude: float, eps: float) -> None:
    x = (np.random.default_rng(0).uniform(0.5, 1, (3, 77)) * magnitude).astype(np.float32)
    assert_ulps(ops.rms_norm(x, None, eps, **where), rms_norm(x, None, eps), ULPS)


def test_zeros_stay_zeros(where: Where) -> None:
    x = np.zeros((2, 33), np.float32)
    assert not ops.rms_norm(x, eps=0.0, **where).any()


def test_nan_marks_its_row_alone(where: Where) -> None:
    x = numbers((3, 40))
    x[1, 7] = np.nan
    out = ops.rms_norm(x, **where)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()


def test_threads_change_nothing(isa: str) -> None:
    x = laid_out(numbers((301, 1000)), "permuted")
    results = [ops.rms_norm(x, isa=isa, threads=n).tobytes() for n in (1, 2, 5)]
    assert results[0] == results[1] == results[2]


@settings(max_examples=30, deadline=None)
@given(
    isa=st.sampled_from(ops.available_isas()),
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**32),
)
def test_property(isa: str, shape: tuple[int, ...], exponent: int, seed: int) -> None:
    shape = shape if np.prod(shape) < 20000 else shape[-2:]
    x = numbers(shape, seed=seed) * np.float32(2.0) ** exponent
    axes = np.random.default_rng(seed).permutation(len(shape))
    x = x.transpose(axes)
    assert_ulps(ops.rms_norm(x, isa=isa, threads=1), rms_norm(x, None, 1e-6), ULPS)


def test_messages() -> None:
    x = numbers((2, 8))
    with pytest.raises(ShapeError, match=r"rms_norm: weight F32 \[7\] must be \[8\]"):
        ops.rms_norm(x, numbers((7,)))
    with pytest.raises(FormatError, match=r"rms_norm: weight is F16 \[8\], accepted is F32"):
        ops.rms_norm(x, numbers((8,), np.float16))
    with pytest.raises(ShapeError, match="eps -1 is negative"):
        ops.rms_norm(x, eps=-1)
    with pytest.raises(ShapeError, match="has no dim"):
        ops.rms_norm(np.float32(1))
