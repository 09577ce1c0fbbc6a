"""copy: every pair of float formats bit for bit, any strides on both sides, blocks, integers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_cache import Runner
from mla_backend import _core, ops
from mla_backend.errors import FormatError, ShapeError
from mla_backend.ops import Where
from reference.layouts import LAYOUTS, laid_out

DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SHAPES = [(1,), (7,), (3, 16), (2, 33), (2, 3, 5), (2, 1, 3, 9), (2, 4500), (0, 3), (3, 0)]


def numbers(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_same_bits(got: Any, want: Any) -> None:
    assert got.dtype == want.dtype
    width = f"u{got.itemsize}"
    np.testing.assert_array_equal(got.view(width), np.ascontiguousarray(want).view(width))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_formats_and_layouts(where: Where, source: str, target: str, layout: str) -> None:
    for shape in SHAPES:
        x = laid_out(numbers(shape, DTYPES[source]), layout)
        assert_same_bits(ops.copy(x, target, **where), x.astype(DTYPES[target]))


@pytest.mark.parametrize("source", ["F16", "BF16"])
def test_every_16_bit_number_widens_exactly(where: Where, source: str) -> None:
    x = np.arange(2**16, dtype=np.uint16).view(DTYPES[source])
    with np.errstate(invalid="ignore"):
        want = x.astype(np.float32)
    for piece in (slice(None), slice(1, None, 3)):
        got = ops.copy(x[piece], "F32", **where)
        np.testing.assert_array_equal(got, want[piece])  # NaN equals NaN here
        np.testing.assert_array_equal(np.signbit(got), np.signbit(want[piece]))


@pytest.mark.parametrize("target", ["F16", "BF16"])
def test_narrowing_rounds_to_nearest_even(where: Where, target: str) -> None:
    """Numbers of every exponent, and the ties between neighbours."""
    bits = np.random.default_rng(0).integers(0, 2**32, 60000, dtype=np.uint32)
    ties = np.arange(2**16, dtype=np.uint16).view(DTYPES[target]).astype(np.float32)
    ties = ties.view(np.uint32) + (0x1000 if target == "F16" else 0x8000)
    x = np.concatenate([bits, ties.astype(np.uint32)]).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(DTYPES[target])
    got = ops.copy(x, target, **where)
    nan = np.isnan(x)
    assert np.isnan(got[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], want.view(np.uint16)[~nan])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers(where: Where, layout: str) -> None:
    x = laid_out(np.arange(-60, 60, dtype=np.int32).reshape(4, 5, 6), layout)
    assert_same_bits(ops.copy(x, "I32", **where), x)


def test_blocks_keep_their_bytes(where: Where) -> None:
    """Rows of a quantized tensor, every second one, through the graph."""
    bytes_ = np.random.default_rng(0).integers(0, 256, (6, 3 * 34), dtype=np.uint8)
    runner = Runner(where)
    tensor = _core.Tensor(bytes_, "Q8_0", [3, 96], [2 * 3 * 34, 34], 3 * 34)
    runner.graph.output(runner.graph.copy(runner.graph.weight("w", tensor), "Q8_0"))
    np.testing.assert_array_equal(runner.run(), bytes_[1::2])


def test_threads_change_nothing(isa: str) -> None:
    x = laid_out(numbers((301, 1000)), "permuted")
    results = [ops.copy(x, "F16", isa=isa, threads=n).tobytes() for n in (1, 2, 5)]
    assert results[0] == results[1] == results[2]


@settings(max_examples=30, deadline=None)
@given(
    isa=st.sampled_from(ops.available_isas()),
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
    formats=st.tuples(st.sampled_from(list(DTYPES)), st.sampled_from(list(DTYPES))),
    seed=st.integers(0, 2**32),
    threads=st.integers(1, 4),
)
def test_property(isa: str, shape: Any, formats: Any, seed: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    x = numbers(shape, DTYPES[formats[0]], seed).transpose(rng.permutation(len(shape)))
    x = x[tuple(slice(None, None, int(step)) for step in rng.choice([-2, -1, 1, 2], len(shape)))]
    assert_same_bits(
        ops.copy(x, formats[1], isa=isa, threads=threads), x.astype(DTYPES[formats[1]])
    )


def test_the_source_may_be_read_only(where: Where) -> None:
    x = np.frombuffer(np.arange(5, dtype=np.float32).tobytes(), np.float32)
    assert_same_bits(ops.copy(x, **where), x)


def test_messages() -> None:
    x = numbers((2, 3))
    with pytest.raises(FormatError, match="copy: to Q4_K, accepted is F32, F16 or BF16"):
        ops.copy(x, "q4_k")
    with pytest.raises(FormatError, match="format 'f8' is unknown; accepted are F32"):
        ops.copy(x, "f8")
    with pytest.raises(FormatError, match="copy: x is >f4, accepted is float32"):
        ops.copy(x.astype(">f4"))
    with pytest.raises(FormatError, match="copy: x is I32"):
        ops.copy(np.zeros(3, np.int32), "F32")
    with pytest.raises(ShapeError, match="5 dimensions came, at most 4"):
        ops.copy(np.zeros((1,) * 5, np.float32))
    odd = np.zeros(9, np.uint8)[1:].view(np.float32)
    with pytest.raises(ShapeError, match="elements of x are not aligned"):
        ops.copy(odd)
