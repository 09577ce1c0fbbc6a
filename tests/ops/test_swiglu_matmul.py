"""swiglu_matmul against float64: dense and by expert, weights of one and of two formats."""

from __future__ import annotations

from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mla_backend import ops
from mla_backend.errors import ShapeError
from mla_backend.ops import Precision, Where
from reference.errors import nmse
from reference.layouts import LAYOUTS, laid_out
from reference.matmul import swiglu_matmul
from reference.weights import FORMATS, block_elems, random_weight

# The gate's error passes through silu and meets the up product's: up to four times that of one.
BOUND: dict[Precision, float] = {"fast": 5e-4, "exact": 1e-10}
PRECISIONS = tuple(BOUND)


def numbers(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def small(shape: tuple[int, ...], seed: int = 0) -> Any:
    """Activations that give gates around 1, where silu bends."""
    return numbers(shape, seed=seed) / np.float32(10)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_formats(where: Where, format: str, precision: Precision) -> None:
    k = {1: 75, 32: 288}.get(block_elems(format), 512)
    gate, gate_values = random_weight(format, (4, 37, k))
    up, up_values = random_weight(format, (4, 37, k), seed=1)
    x = small((11, k))
    got = ops.swiglu_matmul(x, gate[1], up[1], precision=precision, **where)
    assert nmse(got, swiglu_matmul(x, gate_values[1], up_values[1])) <= BOUND[precision]
    ids = np.random.default_rng(2).integers(0, 4, (11, 3), np.int32)
    got = ops.swiglu_matmul(x, gate, up, ids=ids, precision=precision, **where)
    assert nmse(got, swiglu_matmul(x, gate_values, up_values, ids=ids)) <= BOUND[precision]


@pytest.mark.parametrize("format", FORMATS)
def test_many_tokens(where: Where, format: str) -> None:
    """Tiles of products on matrix units, dense and by expert."""
    gate, gate_values = random_weight(format, (6, 72, 256))
    up, up_values = random_weight(format, (6, 72, 256), seed=1)
    x = small((150, 256))
    got = ops.swiglu_matmul(x, gate[1], up[1], **where)
    assert nmse(got, swiglu_matmul(x, gate_values[1], up_values[1])) <= BOUND["fast"]
    ids = np.random.default_rng(2).integers(0, 5, (150, 2), np.int32)
    got = ops.swiglu_matmul(x, gate, up, ids=ids, **where)
    assert nmse(got, swiglu_matmul(x, gate_values, up_values, ids=ids)) <= BOUND["fast"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_formats(where: Where, precision: Precision) -> None:
    """Weights that want x packed alike, and differently."""
    x = small((5, 256))
    ids = np.array([[0, 2], [1, 1], [2, 0], [0, 1], [2, 2]], np.int32)
    for a, b in product(("F32", "BF16", "Q8_0", "Q4_K"), repeat=2):
        gate, gate_values = random_weight(a, (3, 20, 256))
        up, up_values = random_weight(b, (3, 20, 256), seed=1)
        got = ops.swiglu_matmul(x, gate[0], up[0], precision=precision, **where)
        assert nmse(got, swiglu_matmul(x, gate_values[0], up_values[0])) <= BOUND[precision]
        got = ops.swiglu_matmul(x, gate, up, ids=ids, precision=precision, **where)
        assert nmse(got, swiglu_matmul(x, gate_values, up_values, ids=ids)) <= BOUND[precision]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_layouts(where: Where, dtype: Any, layout: str) -> None:
    x = laid_out(numbers((2, 3, 5, 70), dtype), layout)
    gate, up = (laid_out(numbers((300, 70), seed=s), layout) for s in (1, 2))
    got = ops.swiglu_matmul(x, gate, up, precision="exact", **where)
    assert nmse(got, swiglu_matmul(x, gate, up)) <= BOUND["exact"]
    got = ops.swiglu_matmul(x, gate, np.ascontiguousarray(up), precision="exact", **where)
    assert nmse(got, swiglu_matmul(x, gate, up)) <= BOUND["exact"]


@pytest.mark.parametrize("format", ["F16", "Q6_K"])
def test_threads_and_tiles_change_nothing(isa: str, format: str) -> None:
    gate, _ = random_weight(format, (3, 600, 256))
    up, _ = random_weight(format, (3, 600, 256), seed=1)
    x = small((150, 256))
    ids = np.random.default_rng(2).integers(0, 3, (150, 2), np.int32)
    for w, v, chosen in ((gate[0], up[0], None), (gate, up, ids)):
        results = [ops.swiglu_matmul(x, w, v, ids=chosen, isa=isa, threads=n) for n in (1, 2, 5)]
        assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()
        # Among as few rows as meet a matrix one by one, and among many.
        for first, last in ((97, 101), (90, 150)):
            some = None if chosen is None else chosen[first:last]
            got = ops.swiglu_matmul(x[first:last], w, v, ids=some, isa=isa, threads=1)
            if last - first < 8:
                one = None if chosen is None else chosen[99:100]
                alone = ops.swiglu_matmul(x[99:100], w, v, ids=one, isa=isa, threads=1)
                np.testing.assert_array_equal(alone, got[99 - first : 100 - first])
            else:
                np.testing.assert_array_equal(got, results[0][first:last])


def test_empty(where: Where) -> None:
    w, _ = random_weight("Q8_0", (2, 5, 32))
    none = np.zeros((0, 2), np.int32)
    assert ops.swiglu_matmul(numbers((0, 32)), w, w, ids=none, **where).shape == (0, 2, 5)
    assert ops.swiglu_matmul(numbers((3, 0, 32)), w[0], w[0], **where).shape == (3, 0, 5)
    for format in ("F32", "Q8_0"):
        nothing, _ = random_weight(format, (5, 0))
        for m in (4, 40):
            assert not ops.swiglu_matmul(numbers((m, 0)), nothing, nothing, **where).any()


def test_messages(where: Where) -> None:
    w, _ = random_weight("Q8_0", (3, 5, 32))
    with pytest.raises(ShapeError, match=r"swiglu_matmul: ids\[1, 0\] is 3, .* 0 to 2"):
        ops.swiglu_matmul(numbers((2, 32)), w, w, ids=np.array([[0], [3]], np.int32), **where)
    with pytest.raises(ShapeError, match="differ"):
        ops.swiglu_matmul(numbers((2, 32)), w[0], w[0, :4], **where)
