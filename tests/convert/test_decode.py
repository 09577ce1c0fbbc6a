"""Numbers of a checkpoint: every fp8 code, scales of blocks, any run of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from convert.checkpoints import write_safetensors
from mla_backend.convert.decode import Source, read_bits, read_floats, scale_shape
from mla_backend.convert.safetensors import read_header
from mla_backend.errors import ModelError

FP8, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu


def stored(path: Path, tensors: dict[str, Any], block: tuple[int, int] = (128, 128)) -> Source:
    write_safetensors(path / "m.safetensors", tensors)
    found = read_header(path / "m.safetensors")
    return Source(found["w"], found.get("s"), block)


def test_every_code(tmp_path: Path) -> None:
    codes = np.array([i for i in range(256) if i & 0x7F != 0x7F], np.uint8)[None].repeat(2, 0)
    values = codes.view(FP8)
    scales = np.array([[0.25, 3.0]], np.float32)
    found = read_floats(stored(tmp_path, {"w": values, "s": scales}), 0, 2)
    expected = values.astype(np.float32)
    expected[:, :128] *= np.float32(0.25)
    expected[:, 128:] *= np.float32(3.0)
    np.testing.assert_array_equal(found, expected)


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    values = np.linspace(-300, 300, 128, dtype=np.float32).astype(FP8)[None]
    scales = np.array([[0.125, 2.0**-20]], np.float32)
    source = stored(tmp_path, {"w": values, "s": scales.astype(E8M0)}, (1, 64))
    expected = values.astype(np.float32) * scales.repeat(64, 1)
    np.testing.assert_array_equal(read_floats(source, 0, 1), expected)
    scales[0, 1] = np.nan
    source = stored(tmp_path, {"w": values, "s": scales.astype(E8M0)}, (1, 64))
    with pytest.raises(ModelError, match="not finite"):
        read_floats(source, 0, 1)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (128, 128), (130, 300), (257, 127), (300, 256)])
@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_runs_of_rows(tmp_path: Path, shape: tuple[int, int], block: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    values = random.uniform(-400, 400, shape).astype(FP8)
    scales = random.uniform(0.1, 9, scale_shape(shape, block)).astype(np.float32)
    source = stored(tmp_path, {"w": values, "s": scales}, block)
    rows, columns = np.indices(shape)
    expected = values.astype(np.float32) * scales[rows // block[0], columns // block[1]]
    for first, last in {
        (0, shape[0]),
        (shape[0] // 2, shape[0]),
        (0, 1),
        (shape[0] // 3, shape[0]),
    }:
        np.testing.assert_array_equal(
            read_floats(source, first, last - first), expected[first:last]
        )


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_refused(tmp_path: Path, code: int) -> None:
    codes = np.zeros((4, 4), np.uint8)
    codes[2, 1] = code
    source = stored(tmp_path, {"w": codes.view(FP8), "s": np.ones((1, 1), np.float32)})
    assert read_floats(source, 0, 2).shape == (2, 4)
    with pytest.raises(ModelError, match="'w' holds NaN"):
        read_floats(source, 0, 4)


def test_infinite_scales_are_refused(tmp_path: Path) -> None:
    scales = np.full((1, 1), np.inf, np.float32)
    source = stored(tmp_path, {"w": np.zeros((4, 4), FP8), "s": scales})
    with pytest.raises(ModelError, match="'s' is not finite"):
        read_floats(source, 0, 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats(tmp_path: Path, dtype: Any) -> None:
    values = np.random.default_rng(2).standard_normal((6, 2, 3)).astype(dtype)
    source = stored(tmp_path, {"w": values})
    np.testing.assert_array_equal(read_floats(source, 2, 3), values[2:5].astype(np.float32))
    assert read_bits(source, 2, 3).tobytes() == values[2:5].tobytes()
