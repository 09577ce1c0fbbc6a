"""matmul against float64 over all formats, instruction sets, precisions and awkward shapes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_cache import Runner, constant
from mla_backend import _core, ops
from mla_backend.errors import FormatError, ShapeError
from mla_backend.ops import Precision, QuantTensor, Where
from reference.errors import nmse
from reference.layouts import LAYOUTS, laid_out
from reference.matmul import matmul
from reference.weights import FLOATS, FORMATS, QUANTIZED, block_elems, random_weight

BOUND: dict[Precision, float] = {"fast": 5e-4, "exact": 1e-10}
PRECISIONS = tuple(BOUND)
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
# Rows of x on both sides of every tile of the kernels (8, 4, 2, 1; 64 in a tile of work).
ROWS = [1, 2, 3, 5, 7, 8, 15, 64, 65, 130]


def numbers(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Any:
    return (np.random.default_rng(seed).normal(size=shape) + 0.1).astype(dtype)


def widths(format: str) -> list[int]:
    """K of every kind: tails of registers, of 256 elements, of neither."""
    return {1: [1, 2, 7, 16, 31, 33, 100, 256, 257, 515], 32: [32, 96, 256, 288, 800]}.get(
        block_elems(format), [256, 768]
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_formats(where: Where, format: str, precision: Precision) -> None:
    for k in widths(format):
        w, values = random_weight(format, (19, k), seed=k)
        for m in (1, 6):
            x = numbers((m, k), seed=m)
            got = ops.matmul(x, w, precision=precision, **where)
            assert nmse(got, matmul(x, values)) <= BOUND[precision], (k, m)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("format", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_rows_of_x(where: Where, format: str, precision: Precision) -> None:
    """On the CPU every row of x has one result among few rows, and one among many, bit for bit."""
    w, values = random_weight(format, (33, 512))
    x = numbers((max(ROWS), 512))
    whole = ops.matmul(x, w, precision=precision, **where)
    n_few = 11 if format == "BF16" else 7  # more have their weights unpacked once for all rows
    few = ops.matmul(x[:n_few], w, precision=precision, **where)
    assert nmse(whole, matmul(x, values)) <= BOUND[precision]
    for m in ROWS:
        got = ops.matmul(x[:m], w, precision=precision, **where)
        if where["backend"] == "cpu":
            np.testing.assert_array_equal(got, (few if m <= n_few else whole)[:m])
        assert nmse(got, matmul(x[:m], values)) <= BOUND[precision]


@pytest.mark.parametrize("format", FORMATS)
def test_many_rows(where: Where, format: str) -> None:
    """Tiles of products on matrix units, full ones and part ones, with and without a residual."""
    k = {1: 200, 32: 288}.get(block_elems(format), 512)
    for m, n in ((150, 72), (257, 136)):
        w, values = random_weight(format, (n, k), seed=n)
        x, residual = numbers((m, k), seed=m), numbers((m, n), seed=1)
        got = ops.matmul(x, w, **where)
        assert nmse(got, matmul(x, values)) <= BOUND["fast"], (m, n)
        got = ops.matmul(x, w, residual=residual, **where)
        assert nmse(got, matmul(x, values, residual=residual)) <= BOUND["fast"], (m, n)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_transposed(where: Where, format: str, precision: Precision) -> None:
    for n in widths(format):
        w, values = random_weight(format, (13, n), seed=n)
        for m in (1, 6):
            x = numbers((m, 13), seed=m)
            got = ops.matmul(x, w, transpose_w=True, precision=precision, **where)
            want = matmul(x, values, transpose_w=True)
            assert nmse(got, want) <= BOUND["exact" if format in QUANTIZED else precision]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["F16", "Q5_0", "Q6_K"])
def test_layouts_of_x(where: Where, format: str, dtype: Any, layout: str) -> None:
    w, values = random_weight(format, (17, 512))
    x = laid_out(numbers((2, 3, 5, 512), dtype), layout)
    got = ops.matmul(x, w, precision="exact", **where)
    assert nmse(got, matmul(x, values)) <= BOUND["exact"]
    assert nmse(ops.matmul(x, w, **where), matmul(x, values)) <= BOUND["fast"]


@pytest.mark.parametrize("transpose_w", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", list(FLOATS))
def test_layouts_of_w(where: Where, format: str, layout: str, transpose_w: bool) -> None:
    for k, n in ((70, 19), (1, 19), (70, 1), (3, 300)):
        w = numbers((2, k, n) if transpose_w else (2, n, k), FLOATS[format])
        x = numbers((4, 3, k))
        want = matmul(x, w, transpose_w=transpose_w)
        for precision in PRECISIONS:
            got = ops.matmul(
                x, laid_out(w, layout), transpose_w=transpose_w, precision=precision, **where
            )
            assert nmse(got, want) <= BOUND[precision], (k, n)


@pytest.mark.parametrize(
    "batches", [((6, 4), (3, 2)), ((6, 4), (1, 4)), ((6, 4), (6, 1)), ((6, 4), (2,))]
)
@pytest.mark.parametrize("format", ["F32", "Q8_0"])
def test_batches(where: Where, format: str, batches: tuple[Any, Any]) -> None:
    of_x, of_w = batches
    w, values = random_weight(format, (*of_w, 9, 64))
    x = numbers((*of_x, 5, 64))
    got = ops.matmul(x, w, precision="exact", **where)
    assert nmse(got, matmul(x, values)) <= BOUND["exact"]


def test_heads_in_place(where: Where) -> None:
    """x [T, H, N] seen as [H, T, N] against one matrix for each head, both ways round."""
    x = numbers((7, 4, 32)).transpose(1, 0, 2)
    for transpose_w, shape in ((False, (4, 64, 32)), (True, (4, 32, 64))):
        w, values = random_weight("Q8_0", shape)
        got = ops.matmul(x, w, transpose_w=transpose_w, precision="exact", **where)
        assert nmse(got, matmul(x, values, transpose_w=transpose_w)) <= BOUND["exact"]


def test_broadcast_x(where: Where) -> None:
    x = np.broadcast_to(numbers((1, 3, 96)), (4, 3, 96))
    repeated = np.broadcast_to(numbers((5, 1)), (5, 96))
    w, values = random_weight("Q4_1", (4, 11, 96))
    assert nmse(ops.matmul(x, w, **where), matmul(x, values)) <= BOUND["fast"]
    got = ops.matmul(repeated, w[0], precision="exact", **where)
    assert nmse(got, matmul(repeated, values[0])) <= BOUND["exact"]


@pytest.mark.parametrize("format", QUANTIZED)
def test_slices_of_weights(where: Where, format: str) -> None:
    w, values = random_weight(format, (4, 12, 256))
    assert isinstance(w, QuantTensor)
    x = numbers((2, 3, 256))
    got = ops.matmul(x, w[1:3, 5:], precision="exact", **where)
    assert nmse(got, matmul(x, values[1:3, 5:])) <= BOUND["exact"]
    got = ops.matmul(x, w[::2, ::-3], precision="exact", **where)
    assert nmse(got, matmul(x, values[::2, ::-3])) <= BOUND["exact"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_views_of_weights(where: Where, format: str, precision: Precision) -> None:
    """Rows of some matrices of one weight, as graphs cut them."""
    w, values = random_weight(format, (4, 12, 256))
    x = numbers((2, 3, 256))
    runner = Runner(where)
    g = runner.graph
    rows = w.rows if isinstance(w, QuantTensor) else np.ascontiguousarray(w).view(np.uint8)
    whole = g.weight("w", _core.Tensor(rows, format, [4, 12, 256]))
    part = g.slice(g.slice(whole, 0, 1, 3), 1, 5, 12)
    g.output(g.matmul(constant(g, "x", x), part, precision=precision))
    assert nmse(runner.run(), matmul(x, values[1:3, 5:])) <= BOUND[precision]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual(where: Where, layout: str) -> None:
    for format, transpose_w in (("F32", False), ("Q4_0", False), ("Q4_0", True)):
        w, values = random_weight(format, (64, 64))
        x = numbers((2, 5, 64))
        residual = laid_out(numbers((2, 5, 64), seed=5), layout)
        got = ops.matmul(
            x, w, transpose_w=transpose_w, residual=residual, precision="exact", **where
        )
        want = matmul(x, values, transpose_w=transpose_w, residual=residual)
        assert nmse(got, want) <= BOUND["exact"]


@pytest.mark.parametrize("format", ["F32", "F16", "Q8_0", "Q4_K"])
def test_empty(where: Where, format: str) -> None:
    k = 256
    w, _ = random_weight(format, (3, k))
    assert ops.matmul(numbers((0, k)), w, **where).shape == (0, 3)
    assert ops.matmul(numbers((2, 0, k)), w, **where).shape == (2, 0, 3)
    assert ops.matmul(numbers((2, k)), w[:0], **where).shape == (2, 0)
    nothing, _ = random_weight(format, (3, 0))
    for m in (2, 40):
        residual = numbers((m, 3))
        for precision in PRECISIONS:
            given: Any = {"precision": precision, **where}
            assert not ops.matmul(numbers((m, 0)), nothing, **given).any()
            got = ops.matmul(numbers((m, 0)), nothing, residual=residual, **given)
            np.testing.assert_array_equal(got, residual)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_threads_change_nothing(isa: str, format: str, precision: Precision) -> None:
    w, _ = random_weight(format, (2, 700, 512))
    for x in (numbers((2, 1, 512)), numbers((4, 70, 512))):
        results = [
            ops.matmul(x, w, precision=precision, isa=isa, threads=n).tobytes() for n in (1, 2, 5)
        ]
        assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("transpose_w", [False, True])
def test_threads_change_nothing_across(isa: str, transpose_w: bool) -> None:
    w, _ = random_weight("Q6_K", (768, 768))
    strided = numbers((700, 2, 300))[:, 0, ::2]
    for weight in (w, strided.T if transpose_w else strided):
        x = numbers((9, weight.shape[-2 if transpose_w else -1]))
        results = [
            ops.matmul(x, weight, transpose_w=transpose_w, isa=isa, threads=n).tobytes()
            for n in (1, 2, 5)
        ]
        assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("format", ["F32", "BF16", "Q8_0", "Q4_K", "IQ4_NL"])
def test_bad_numbers_reach_the_result(where: Where, format: str, precision: Precision) -> None:
    w, _ = random_weight(format, (4, 256))
    for bad in (np.nan, np.inf, -np.inf):
        x = numbers((3, 256))
        x[1, 77] = bad
        got = ops.matmul(x, w, precision=precision, **where)
        assert not np.isfinite(got[1]).any()
        assert np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e30])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_sizes_of_numbers(where: Where, precision: Precision, scale: float) -> None:
    """Each 32 activations have their own scale: large ones do not drown small ones."""
    x = numbers((3, 256)) * np.float32(scale)
    x[1] = 0
    w, values = random_weight("Q6_K", (8, 256))
    got = ops.matmul(x, w, precision=precision, **where)
    assert nmse(got, matmul(x, values)) <= BOUND[precision]
    assert not got[1].any()


@pytest.mark.parametrize("format", QUANTIZED)
def test_constant_activations(where: Where, format: str) -> None:
    """Sums of one sign: where offsets of the weights must cancel exactly enough."""
    w, values = random_weight(format, (16, 2048))
    x = np.full((2, 2048), 3.0, np.float32)
    assert nmse(ops.matmul(x, w, **where), matmul(x, values)) <= 1e-8


@settings(max_examples=60, deadline=None)
@given(
    isa=st.sampled_from(ops.available_isas()),
    format=st.sampled_from(FORMATS),
    m=st.integers(1, 20),
    n=st.integers(1, 40),
    blocks=st.integers(1, 5),
    layout=st.sampled_from(LAYOUTS),
    precision=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 2**32),
)
def test_property(
    isa: str, format: str, m: int, n: int, blocks: int, layout: str, precision: Any, seed: int
) -> None:
    k = blocks * block_elems(format)
    w, values = random_weight(format, (n, k), seed)
    x = laid_out(numbers((m, k), seed=seed), layout)
    got = ops.matmul(x, w, precision=precision, isa=isa, threads=2)
    want = matmul(x, values)
    # A few products may cancel: the error is measured against them and not against their sum.
    size = np.abs(x.astype(np.float64)) @ np.abs(values.astype(np.float64)).T
    bound = {"fast": 1e-2, "exact": 1e-6}[precision]
    assert (np.abs(got - want) <= bound * size + 1e-30).all()


def test_messages() -> None:
    with pytest.raises(ShapeError, match=r"K differs: x F32 \[2, 3\], w F32 \[4, 5\]"):
        ops.matmul(numbers((2, 3)), numbers((4, 5)))
    with pytest.raises(ShapeError, match="leading dims of w"):
        ops.matmul(numbers((3, 2, 4)), numbers((2, 5, 4)))
    with pytest.raises(FormatError, match="accepted is"):
        ops.matmul(numbers((2, 3)).astype(np.int32), numbers((4, 3)))
