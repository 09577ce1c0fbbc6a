"""matmul_indexed against float64: experts, repeated and missing ones, sums, 64-bit offsets."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import ops
from mla_backend.errors import ShapeError
from mla_backend.ops import Precision, QuantTensor, Where
from reference.errors import nmse
from reference.layouts import LAYOUTS, laid_out
from reference.matmul import matmul_indexed
from reference.weights import FORMATS, block_elems, random_weight

BOUND: dict[Precision, float] = {"fast": 5e-4, "exact": 1e-10}
PRECISIONS = tuple(BOUND)


def numbers(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def choices(n_tokens: int, n_used: int, n_experts: int, seed: int = 0) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, n_experts, (n_tokens, n_used), np.int32)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_formats(where: Where, format: str, precision: Precision) -> None:
    k = {1: 75, 32: 288}.get(block_elems(format), 512)
    w, values = random_weight(format, (5, 21, k))
    ids = choices(9, 3, 5)
    weights, residual = numbers((9, 3), seed=1), numbers((9, 21), seed=2)
    for x in (numbers((9, 1, k)), numbers((9, 3, k))):
        got = ops.matmul_indexed(x, w, ids, precision=precision, **where)
        assert nmse(got, matmul_indexed(x, values, ids)) <= BOUND[precision]
        got = ops.matmul_indexed(
            x, w, ids, weights=weights, residual=residual, precision=precision, **where
        )
        want = matmul_indexed(x, values, ids, weights=weights, residual=residual)
        assert nmse(got, want) <= BOUND[precision]


def test_many_tokens_of_one_expert(where: Where) -> None:
    """More rows than a tile holds, and experts without any."""
    w, values = random_weight("Q4_K", (8, 40, 256))
    ids = np.where(np.arange(300)[:, None] % 50 == 0, 6, [[2, 7]]).astype(np.int32)
    x = numbers((300, 1, 256))
    got = ops.matmul_indexed(x, w, ids, precision="exact", **where)
    assert nmse(got, matmul_indexed(x, values, ids)) <= BOUND["exact"]


@pytest.mark.parametrize("format", FORMATS)
def test_many_tokens(where: Where, format: str) -> None:
    """Tiles of products on matrix units: full ones, part ones, experts without tokens."""
    w, values = random_weight(format, (9, 72, 256))
    ids = np.concatenate([choices(170, 2, 5), np.full((30, 2), 7, np.int32)])
    x, weights = numbers((200, 1, 256)), numbers((200, 2), seed=1)
    got = ops.matmul_indexed(x, w, ids, weights=weights, **where)
    want = matmul_indexed(x, values, ids, weights=weights)
    assert nmse(got, want) <= BOUND["fast"]


@pytest.mark.large
def test_sum_in_blocks_of_columns(where: Where) -> None:
    """So many pairs that their products are summed for some columns at a time."""
    w, values = random_weight("F32", (2, 520, 8))
    ids = choices(4200, 6, 2)
    x, weights = numbers((4200, 1, 8)), numbers((4200, 6))
    got = ops.matmul_indexed(x, w, ids, weights=weights, precision="exact", **where)
    want = np.zeros((4200, 520))
    both = np.einsum("tk,enk->ten", x[:, 0].astype(np.float64), values.astype(np.float64))
    for a in range(6):
        want += weights[:, a, None] * both[np.arange(4200), ids[:, a]]
    assert nmse(got, want) <= BOUND["exact"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(where: Where, layout: str) -> None:
    x = laid_out(numbers((7, 2, 64)), layout)
    ids = laid_out(choices(7, 2, 4), layout)
    weights = laid_out(numbers((7, 2), seed=3), layout)
    residual = laid_out(numbers((7, 20), seed=4), layout)
    quantized, decoded = random_weight("Q5_1", (4, 20, 64))
    floats, same = random_weight("F16", (4, 20, 64))
    for w, values in ((quantized, decoded), (laid_out(np.asarray(floats), layout), same)):
        got = ops.matmul_indexed(
            x, w, ids, weights=weights, residual=residual, precision="exact", **where
        )
        want = matmul_indexed(x, values, ids, weights=weights, residual=residual)
        assert nmse(got, want) <= BOUND["exact"]


@pytest.mark.parametrize("format", ["BF16", "Q8_0", "Q4_K"])
def test_grouping_and_threads_change_nothing(isa: str, format: str) -> None:
    """Each token has one result among few to an expert, whatever the number of threads, and one
    among many.
    """
    w, _ = random_weight(format, (6, 300, 256))
    x, ids, weights = numbers((50, 1, 256)), choices(50, 4, 6), numbers((50, 4))

    def rows(first: int, last: int, threads: int) -> Any:
        some = slice(first, last)
        return ops.matmul_indexed(
            x[some], w, ids[some], weights=weights[some], isa=isa, threads=threads
        )

    few = np.concatenate([rows(t, t + 10, 1) for t in range(0, 50, 10)])
    for whole, n in ((few, 10), (rows(0, 50, 1), 50)):
        for threads in (2, 5):
            assert rows(0, n, threads).tobytes() == whole[:n].tobytes()
    for t in (0, 17, 49):
        np.testing.assert_array_equal(rows(t, t + 1, 1), few[t : t + 1])
    np.testing.assert_array_equal(rows(7, 47, 1), rows(0, 50, 1)[7:47])


def test_empty(where: Where) -> None:
    w, _ = random_weight("Q8_0", (3, 5, 32))
    none = np.zeros((0, 2), np.int32)
    x = numbers((0, 1, 32))
    assert ops.matmul_indexed(x, w, none, **where).shape == (0, 2, 5)
    weights = np.zeros((0, 2), np.float32)
    assert ops.matmul_indexed(x, w, none, weights=weights, **where).shape == (0, 5)
    no_slots = np.zeros((4, 0), np.int32)
    residual = numbers((4, 5))
    got = ops.matmul_indexed(
        numbers((4, 1, 32)), w, no_slots, weights=numbers((4, 0)), residual=residual, **where
    )
    np.testing.assert_array_equal(got, residual)


@pytest.mark.parametrize("bad", [-1, 3, 2**31 - 1, -(2**31)])
def test_ids_out_of_range(where: Where, bad: int) -> None:
    w, _ = random_weight("Q8_0", (3, 5, 32))
    ids = np.zeros((4, 2), np.int32)
    ids[2, 1] = bad
    with pytest.raises(ShapeError, match=rf"matmul_indexed: ids\[2, 1\] is {bad}, .* 0 to 2"):
        ops.matmul_indexed(numbers((4, 1, 32)), w, ids, **where)


def test_offsets_beyond_32_bits() -> None:
    """Experts that lie 2^31 elements and more behind the first."""
    n_experts, n, k = 70, 1024, 32768
    row_bytes = k // 256 * 84  # Q2_K: 2.3e9 elements are 0.8 GB of address space, never touched
    rows = np.zeros((n_experts, n, row_bytes), np.uint8)
    last, values = random_weight("Q2_K", (1, 3, k))
    assert isinstance(last, QuantTensor)
    assert rows.size // 84 * 256 > 2**31
    rows[-1, -3:] = last.rows[0]
    x = numbers((1, 1, k))
    got = ops.matmul_indexed(
        x, QuantTensor(rows, "Q2_K")[:, -3:], np.array([[n_experts - 1]], np.int32), threads=2
    )
    assert nmse(got[0], matmul_indexed(x, values, np.zeros((1, 1), np.int32))[0]) <= BOUND["fast"]
