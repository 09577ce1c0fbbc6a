"""QuantTensor: bytes, shapes, slices and their messages."""

from __future__ import annotations

import numpy as np
import pytest
from mla_backend import ops
from mla_backend.errors import FormatError, ShapeError
from mla_backend.formats import FORMATS
from mla_backend.ops import QuantTensor, quantize
from reference.errors import nmse

WEIGHT_FORMATS = [f for f in FORMATS if f.name != "I32"]


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("format", [f.name for f in WEIGHT_FORMATS])
def test_bytes_and_back(format: str) -> None:
    x = numbers(2, 3, 512)
    q = quantize(x, format.lower())
    assert (q.format, q.shape) == (format, (2, 3, 512))
    assert q.n_bytes == len(q.to_bytes())
    back = QuantTensor.from_bytes(q.to_bytes(), format, (2, 3, 512))
    np.testing.assert_array_equal(back.dequantize(), q.dequantize())
    assert nmse(q.dequantize(), x.astype(np.float64)) < 0.2  # 2-bit numbers
    assert repr(q) == f"QuantTensor({format}, [2, 3, 512])"


def test_slices_are_views() -> None:
    q = quantize(numbers(4, 6, 64), "q8_0")
    whole = q.dequantize()
    for key in (1, slice(1, 3), (slice(None), 2), (slice(None, None, -1), slice(1, 6, 2)), (-1, 0)):
        part = q[key]
        assert np.shares_memory(part.rows, q.rows)
        np.testing.assert_array_equal(part.dequantize(), whole[key])


def test_strided_slices_are_operands() -> None:
    table = quantize(numbers(9, 64), "q8_0")[::-2]
    ids = np.array([4, 0, 2], np.int32)
    np.testing.assert_array_equal(ops.get_rows(table, ids), table.dequantize()[ids])


def test_other_floats_are_encoded() -> None:
    x = numbers(3, 64)
    for dtype in (np.float64, np.float16):
        same = quantize(x.astype(dtype), "q8_0").to_bytes()
        assert same == quantize(x.astype(dtype).astype(np.float32), "q8_0").to_bytes()
    assert quantize(x.T[:32].T, "q8_0").to_bytes() == quantize(x[:, :32].copy(), "q8_0").to_bytes()


def test_messages() -> None:
    with pytest.raises(FormatError, match="format 'q9' is unknown; accepted are F32"):
        quantize(numbers(2, 32), "q9")
    with pytest.raises(FormatError, match=r"Q4_K: rows of \[2, 32\] are no multiple of 256"):
        quantize(numbers(2, 32), "q4_k")
    with pytest.raises(FormatError, match="quantize: int32 came, accepted are floats"):
        quantize(np.zeros((2, 32), np.int32), "q8_0")
    with pytest.raises(ShapeError, match=r"Q8_0 \[2, 32\] takes 68 bytes, 67 came"):
        QuantTensor.from_bytes(bytes(67), "q8_0", (2, 32))
    with pytest.raises(ShapeError, match=r"\[-2, 32\]"):
        QuantTensor.from_bytes(bytes(68), "q8_0", (-2, 32))
    with pytest.raises(FormatError, match="rows are uint8"):
        QuantTensor(np.zeros((2, 33), np.uint8), "q8_0")
    q = quantize(numbers(2, 32), "q8_0")
    with pytest.raises(ShapeError, match="only dims before the last"):
        q[0, 0]
    with pytest.raises(ShapeError, match="indices are integers and slices"):
        q[[0, 1]]  # type: ignore[index]
