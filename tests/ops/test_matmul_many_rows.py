"""Products of many rows of x, for which weights are unpacked once: all formats and odd shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mla_backend import ops
from mla_backend.ops import Where
from reference.errors import nmse
from reference.layouts import LAYOUTS, laid_out
from reference.matmul import matmul
from reference.weights import FORMATS, QUANTIZED, block_elems, random_weight

BOUND = 5e-4
# Rows of w: less than a register of rows, one, parts of the second, several slabs and a part.
N_ROWS = [1, 5, 16, 23, 32, 77]


def numbers(shape: tuple[int, ...], seed: int = 0) -> Any:
    return (np.random.default_rng(seed).normal(size=shape) + 0.1).astype(np.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_shapes(where: Where, format: str) -> None:
    """Ends of slabs in both directions, and of the columns unpacked at a time."""
    widths = {1: [31, 257], 32: [32, 96, 288, 2080], 256: [256, 768, 2304]}[block_elems(format)]
    for k in widths:
        for n in N_ROWS:
            w, values = random_weight(format, (n, k), seed=k)
            x = numbers((13, k), seed=n)
            assert nmse(ops.matmul(x, w, **where), matmul(x, values)) <= BOUND, (n, k)


@pytest.mark.parametrize("format", FORMATS)
def test_row_counts(isa: str, format: str) -> None:
    """A row of x has the same result among any 12 or more rows, by any number of threads."""
    k = max(block_elems(format), 96)
    w, values = random_weight(format, (49, k))
    x = numbers((200, k))
    whole = ops.matmul(x, w, isa=isa, threads=1)
    assert nmse(whole, matmul(x, values)) <= BOUND
    for n in range(12, 30):
        np.testing.assert_array_equal(ops.matmul(x[:n], w, isa=isa, threads=2), whole[:n])
    for first, last in ((1, 200), (99, 167)):
        got = ops.matmul(x[first:last], w, isa=isa, threads=5)
        np.testing.assert_array_equal(got, whole[first:last])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(where: Where, layout: str) -> None:
    for format in ("Q4_K", "Q6_K", "Q5_0", "BF16"):
        w, values = random_weight(format, (40, 512))
        x = laid_out(numbers((2, 3, 10, 512)), layout)
        residual = laid_out(numbers((2, 3, 10, 40), 1), layout)
        got = ops.matmul(x, w, residual=residual, **where)
        assert nmse(got, matmul(x, values, residual=residual)) <= BOUND


def test_more_rows_than_a_tile(where: Where) -> None:
    for format in ("Q4_K", "F16"):
        w, values = random_weight(format, (40, 256))
        x = numbers((1100, 256))
        assert nmse(ops.matmul(x, w, **where), matmul(x, values)) <= BOUND


@pytest.mark.parametrize("format", FORMATS)
def test_extreme_activations(where: Where, format: str) -> None:
    """Rows of zeros, of tiny and of huge numbers; what is not finite reaches its own row alone."""
    k = max(block_elems(format), 64)
    w, values = random_weight(format, (33, k))
    x = numbers((16, k))
    x[1], x[2], x[3] = 0, x[3] * 1e-30, x[3] * 1e30
    x[4, 5], x[5, k - 1] = np.inf, np.nan
    got = ops.matmul(x, w, **where)
    finite = [0, 1, 2, 3, *range(6, 16)]
    assert not np.isfinite(got[4:6]).any()
    for row in finite:
        want = matmul(x[row : row + 1], values)
        assert np.abs(got[row] - want).max() <= 0.05 * np.abs(want).max(), row


def test_largest_products(where: Where) -> None:
    """Bytes at the ends of their range everywhere: no sum on the way overflows."""
    x = np.full((8, 512), 3.0, np.float32)
    x[1::2] *= -1
    for format in QUANTIZED:
        for fill in (0xFF, 0x80, 0x00):
            w, values = random_weight(format, (32, 512), fill=fill)
            got = ops.matmul(x, w, **where)
            assert nmse(got, matmul(x, values)) <= BOUND, (format, fill)
