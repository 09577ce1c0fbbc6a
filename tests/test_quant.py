"""Reference encoders and decoders against gguf-py, and their bounds."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import _core
from mla_backend.errors import FormatError, ShapeError
from mla_backend.formats import FORMATS

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

QUANTIZED = [row for row in FORMATS if row.quantized]
NAMES = [row.name for row in QUANTIZED]
WITH_REFERENCE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
K = 512

# Where the binary16 scales of a block lie, in bytes: random bits there must be finite.
SCALES_AT = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}

# Relative rms error on normal numbers: a tenth above what the search reaches.
NORMAL_ERROR = {
    "Q2_K": 0.295,
    "Q3_K": 0.159,
    "Q4_0": 0.0897,
    "Q4_1": 0.0771,
    "Q4_K": 0.0786,
    "Q5_0": 0.0446,
    "Q5_1": 0.0372,
    "Q5_K": 0.0394,
    "Q6_K": 0.019,
    "Q8_0": 0.00591,
    "IQ4_NL": 0.0812,
    "IQ4_XS": 0.0821,
}


def quantize(x: Floats, name: str) -> Bytes:
    return np.asarray(_core.quantize(x, name))


def dequantize(data: Bytes, name: str, k: int) -> Floats:
    return np.asarray(_core.dequantize(data, name, k))


def round_trip(x: Floats, name: str) -> Floats:
    return dequantize(quantize(x, name), name, x.shape[1])


def relative_rms(got: Floats, expected: Floats) -> float:
    difference = got.astype(np.float64) - expected
    return float(np.sqrt(np.mean(difference**2) / np.mean(expected.astype(np.float64) ** 2)))


def gguf_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def normal(rows: int, k: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, k), np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_decodes_like_gguf(name: str) -> None:
    row = next(row for row in QUANTIZED if row.name == name)
    rng = np.random.default_rng(row.gguf_type)
    n_blocks = 300
    blocks = rng.integers(0, 256, (n_blocks, row.block_bytes), np.uint8)
    for at in SCALES_AT[name]:
        scales = rng.standard_normal(n_blocks).astype(np.float16)
        scales[:3] = [0.0, np.float16(6e-8), np.float16(-6.5e4)]
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(n_blocks, 2)
    expected = gguf.quants.dequantize(blocks, gguf_type(name))
    got = dequantize(blocks, name, row.block_elems)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(
    ("name", "bits"), [("F16", np.uint16), ("BF16", np.uint16), ("F32", np.uint32)]
)
def test_plain_formats_round_trip(name: str, bits: Any) -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(16, -1)
    if name == "F32":
        every = np.random.default_rng(0).integers(0, 2**32, (16, 64), np.uint32)
    numbers = dequantize(every.view(np.uint8), name, every.shape[1])
    again = quantize(numbers, name).view(bits)
    is_number = ~np.isnan(numbers)
    np.testing.assert_array_equal(again[is_number], every[is_number])
    assert np.isnan(dequantize(again.view(np.uint8), name, every.shape[1])[~is_number]).all()


@pytest.mark.parametrize("name", WITH_REFERENCE)
@pytest.mark.parametrize("kind", ["normal", "positive", "heavy"])
def test_no_worse_than_gguf(name: str, kind: str) -> None:
    x = normal(64, K)
    x = {"normal": x, "positive": np.abs(x) + 0.5, "heavy": x**3}[kind]
    reference = gguf.quants.quantize(x, gguf_type(name))
    theirs = relative_rms(gguf.quants.dequantize(reference, gguf_type(name)), x)
    assert relative_rms(round_trip(x, name), x) <= 1.01 * theirs


@pytest.mark.parametrize("name", NAMES)
def test_error_on_normal_numbers(name: str) -> None:
    x = normal(64, K, seed=1)
    error = relative_rms(round_trip(x, name), x)
    assert 0.8 * NORMAL_ERROR[name] < error <= NORMAL_ERROR[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [1e-2, 1.0, 1e4])
def test_error_does_not_depend_on_magnitude(name: str, magnitude: float) -> None:
    x = normal(16, K) * np.float32(magnitude)
    assert relative_rms(round_trip(x, name), x) <= 1.1 * NORMAL_ERROR[name]


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    x = np.zeros((2, K), np.float32)
    np.testing.assert_array_equal(round_trip(x, name), x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.37, -1234.5])
def test_constant_rows(name: str, value: float) -> None:
    x = np.full((2, K), value, np.float32)
    # A level of 1 / 63 of the scale's scale, where the constant meets one at all.
    np.testing.assert_allclose(round_trip(x, name), x, rtol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_outliers_keep_their_value(name: str) -> None:
    x = normal(32, K) * np.float32(0.01)
    x[:, 5] = 3.0
    x[:, 300] = -3.0
    got = round_trip(x, name)
    np.testing.assert_allclose(got[:, [5, 300]], x[:, [5, 300]], rtol=0.15)
    assert relative_rms(got, x) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_tiny_numbers_vanish_quietly(name: str) -> None:
    x = np.full((1, K), 1e-42, np.float32)
    x[0, ::3] = -3e-45
    got = round_trip(x, name)
    assert np.isfinite(got).all()
    assert np.abs(got).max() <= 1e-7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(name: str, value: float) -> None:
    x = normal(3, K)
    x[2, 7] = value
    with pytest.raises(FormatError, match="element 7 is"):
        quantize(x, name)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_scales_beyond_half(name: str) -> None:
    x = np.full((1, K), 3e38, np.float32)
    x[0, 1::2] = -3e38
    with pytest.raises(FormatError, match="exceeds binary16"):
        quantize(x, name)


def test_threads_do_not_change_rows() -> None:
    x = normal(33, K)
    together = quantize(x, "Q4_K")
    for i in range(33):
        np.testing.assert_array_equal(quantize(x[i : i + 1], "Q4_K")[0], together[i])


def test_no_rows() -> None:
    empty = np.zeros((0, K), np.float32)
    assert quantize(empty, "Q6_K").shape == (0, 420)
    assert round_trip(empty, "Q6_K").shape == (0, K)


def test_refuses_wrong_shapes() -> None:
    with pytest.raises(ShapeError, match="multiple of the block"):
        quantize(np.zeros((1, 100), np.float32), "Q4_K")
    with pytest.raises(ShapeError, match=r"expected \[rows, k\]"):
        quantize(np.zeros(256, np.float32), "Q4_K")
    with pytest.raises(ShapeError, match="144 bytes, got 143"):
        dequantize(np.zeros((1, 143), np.uint8), "Q4_K", 256)
    with pytest.raises(ShapeError):
        dequantize(np.zeros((1, 144), np.uint8), "Q4_K", -256)
    with pytest.raises(FormatError, match="is unknown"):
        quantize(np.zeros((1, 256), np.float32), "Q9_K")
    with pytest.raises(FormatError, match="I32 is no format of weights"):
        quantize(np.zeros((1, 256), np.float32), "I32")
    with pytest.raises(TypeError):
        _core.quantize(np.zeros((1, 256)), "Q4_K")
