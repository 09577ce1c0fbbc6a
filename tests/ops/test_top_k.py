"""top_k against a full sort and a sum in float64: layouts, ties, NaN, vocabularies, messages."""

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
from reference.top_k import exp_sums, top_k

#: An exponential (2 ulp) and a sum of few parts; sums of float32 in float32 would lose more.
TOTAL_ERROR = 5e-7


def numbers(shape: tuple[int, ...], seed: int = 0) -> Any:
    return (3 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def check(got: tuple[Any, Any, Any], x: Any, k: int) -> None:
    """Same ids; the values are those of x to the bit; the totals are right to some ulp."""
    ids, values, totals = got
    want = top_k(x, k)
    assert ids.dtype == np.int32
    assert values.dtype == np.float32
    np.testing.assert_array_equal(ids, want)
    chosen = np.take_along_axis(np.asarray(x), want.astype(np.int64), axis=1)
    np.testing.assert_array_equal(
        np.ascontiguousarray(values).view(np.uint32), chosen.view(np.uint32)
    )
    assert totals.dtype == np.float32
    assert totals.shape == (len(x), 1)
    np.testing.assert_allclose(totals[:, 0], exp_sums(x), rtol=TOTAL_ERROR)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(where: Where, layout: str) -> None:
    for shape in ((1, 1), (1, 7), (3, 100), (2, 4097), (5, 9000)):
        x = laid_out(numbers(shape), layout)
        for k in (1, 5, 64, 256):
            if k <= shape[1]:
                check(ops.top_k(x, k, **where), x, k)


@pytest.mark.parametrize("k", [1, 40, 64, 256])
def test_whole_vocabularies(where: Where, k: int) -> None:
    x = numbers((2, 129280))
    check(ops.top_k(x, k, **where), x, k)


def test_sorted_rows(where: Where) -> None:
    """Rising: every number displaces another. Falling: none does."""
    x = np.sort(numbers((2, 20000)), axis=1)
    x[1] = x[1, ::-1]
    check(ops.top_k(x, 100, **where), x, 100)


def test_ties_go_to_the_lower_id(where: Where) -> None:
    x = np.zeros((3, 9001), np.float32)
    x[1, [5, 4500, 9000]] = 1
    x[2] = np.random.default_rng(0).integers(-1, 2, 9001)
    check(ops.top_k(x, 200, **where), x, 200)
    # -0 and 0 are the same number
    x = np.zeros((1, 70), np.float32)
    x[0, ::2] = -0.0
    check(ops.top_k(x, 70, **where), x, 70)


def test_nan_and_infinities(where: Where) -> None:
    x = np.array([[np.nan, -np.inf, 1, np.inf, 0, np.nan, -1e-45, 1e-45]], np.float32)
    for k in range(1, 9):
        check(ops.top_k(x, k, **where), x, k)
    x = np.full((2, 5000), np.nan, np.float32)
    x[1, 4321] = -np.inf
    check(ops.top_k(x, 3, **where), x, 3)


def test_totals_of_rows_that_are_empty_in_part(where: Where) -> None:
    """Whole runs of -inf weigh nothing, whatever the level of the rest; one NaN spoils a row."""
    x = np.full((6, 9000), -np.inf, np.float32)
    x[0, 8999] = -300
    x[1, [3, 5000]] = 88, 87
    x[2] = -1000
    x[4, 4000:] = numbers((5000,))
    x[5] = numbers((9000,))
    x[5, 4097] = np.nan
    check(ops.top_k(x, 2, **where), x, 2)


def test_empty(where: Where) -> None:
    ids, values, totals = ops.top_k(np.zeros((0, 8), np.float32), 3, **where)
    assert ids.shape == values.shape == (0, 3)
    assert totals.shape == (0, 1)


@settings(max_examples=40, deadline=None)
@given(
    isa=st.sampled_from(ops.available_isas()),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 600)),
    levels=st.integers(1, 1000),
    data=st.data(),
    seed=st.integers(0, 2**32),
)
def test_property(isa: str, shape: Any, levels: int, data: st.DataObject, seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, levels, shape).astype(np.float32)
    k = data.draw(st.integers(1, min(shape[1], 256)))
    check(ops.top_k(x, k, isa=isa, threads=2), x, k)


def test_messages() -> None:
    x = numbers((2, 8))
    with pytest.raises(ShapeError, match="top_k: k is 9, accepted is 1 to 8"):
        ops.top_k(x, 9)
    with pytest.raises(ShapeError, match="top_k: k is 257, accepted is 1 to 256"):
        ops.top_k(numbers((1, 1000)), 257)
    with pytest.raises(ShapeError, match="top_k: k is 0"):
        ops.top_k(x, 0)
    with pytest.raises(ShapeError, match=r"logits F32 \[8\] must be \[M, V\]"):
        ops.top_k(x[0], 1)
    with pytest.raises(FormatError, match=r"logits is F16 \[2, 8\], accepted is F32"):
        ops.top_k(x.astype(np.float16), 1)
