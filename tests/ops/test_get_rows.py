"""get_rows: every format decodes to the very numbers that the `gguf` package gives."""

from __future__ import annotations

import numpy as np
import pytest
from mla_backend import ops
from mla_backend.errors import ShapeError
from mla_backend.ops import QuantTensor, Where
from reference.layouts import LAYOUTS, laid_out
from reference.weights import FLOATS, FORMATS, block_elems, random_weight

IDS = np.array([5, 0, 5, 40, 17, 40, 1], np.int32)


@pytest.mark.parametrize("format", FORMATS)
def test_formats(where: Where, format: str) -> None:
    for blocks in (1, 3, 8, 9):
        table, values = random_weight(format, (41, blocks * block_elems(format)), seed=blocks)
        np.testing.assert_array_equal(ops.get_rows(table, IDS, **where), values[IDS])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", list(FLOATS))
def test_layouts(where: Where, format: str, layout: str) -> None:
    table, values = random_weight(format, (41, 19))
    got = ops.get_rows(laid_out(np.asarray(table), layout), laid_out(IDS, layout), **where)
    np.testing.assert_array_equal(got, values[IDS])


def test_slices(where: Where) -> None:
    table, values = random_weight("Q3_K", (82, 512))
    assert isinstance(table, QuantTensor)
    np.testing.assert_array_equal(ops.get_rows(table[::2], IDS, **where), values[::2][IDS])


def test_empty(where: Where) -> None:
    table, _ = random_weight("Q8_0", (3, 64))
    assert ops.get_rows(table, np.zeros(0, np.int32), **where).shape == (0, 64)


@pytest.mark.parametrize("bad", [-1, 41, 2**31 - 1])
def test_ids_out_of_range(where: Where, bad: int) -> None:
    table, _ = random_weight("Q4_0", (41, 32))
    with pytest.raises(ShapeError, match=rf"get_rows: ids\[2\] is {bad}, accepted is 0 to 40"):
        ops.get_rows(table, np.array([1, 2, bad], np.int32), **where)
