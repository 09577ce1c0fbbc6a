"""Numbers of a checkpoint to float32, whole arrays at a time.

fp8 weights w [R, K] come with one scale per block of rows and columns, s [ceil(R/b), ceil(K/c)]:
the number is w * s in float32, exactly as the model that was trained computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from .safetensors import StoredTensor, read_rows

Floats = npt.NDArray[np.float32]

#: Types of weights that are read here.
FLOAT_DTYPES: Final = ("F32", "F16", "BF16")
FP8_DTYPE: Final = "F8_E4M3"
#: Types of their scales; F8_E8M0 has powers of two.
SCALE_DTYPES: Final = (*FLOAT_DTYPES, "F8_E8M0")
#: GGUF's name of each float type, where it is stored as the checkpoint has it.
SAME_FORMAT: Final = {"F32": "F32", "F16": "F16", "BF16": "BF16"}

_BITS: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
#: What each of the 256 codes stands for.
_E4M3: Final[Floats] = (
    np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
)
_SIGNLESS, _NAN_CODE = 0x7F, 0x7F


@dataclass(frozen=True)
class Source:
    """A weight of the checkpoint and, where its numbers are fp8, its scales.

    Attributes:
        tensor: the weight.
        scales: of ``SCALE_DTYPES`` [ceil(rows / block[0]), ceil(columns / block[1])], or None.
        block: rows and columns that share a scale.
    """

    tensor: StoredTensor
    scales: StoredTensor | None = None
    block: tuple[int, int] = (128, 128)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a matrix; blocks at the edges may be partial."""
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def read_floats(source: Source, first: int, count: int) -> Floats:
    """Entries ``first`` to ``first + count`` of the outermost dimension -> float32 [count, ...].

    Raises:
        OSError: the file cannot be read.
        ModelError: fp8 weights or scales are not finite.
    """
    tensor = source.tensor
    shape = (count, *tensor.shape[1:])
    raw = read_rows(tensor, first, count)
    if tensor.dtype == FP8_DTYPE:
        return _decode_fp8(source, raw, first)
    return _widen(raw, tensor.dtype).reshape(shape)


def read_bits(source: Source, first: int, count: int) -> npt.NDArray[Any]:
    """The same entries as they are stored: float32, float16, or bfloat16 as uint16 [count, ...]."""
    tensor = source.tensor
    raw = read_rows(tensor, first, count)
    return raw.view(_BITS[tensor.dtype]).reshape(count, *tensor.shape[1:])


def _widen(raw: npt.NDArray[np.uint8], dtype: str) -> Floats:
    bits = raw.view(_BITS[dtype])
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32, copy=False)


def _decode_fp8(source: Source, raw: npt.NDArray[np.uint8], first: int) -> Floats:
    """Codes [R, K] -> float32 [R, K]."""
    name = source.tensor.name
    if bool(((raw & _SIGNLESS) == _NAN_CODE).any()):
        raise ModelError(f"{source.tensor.path}: tensor {name!r} holds NaN")
    out: Floats = np.take(_E4M3, raw)
    if source.scales is None:
        return out
    rows, columns = source.block
    first_block = first // rows
    last_block = (first + len(raw) - 1) // rows
    scales = _widen(
        read_rows(source.scales, first_block, last_block - first_block + 1), source.scales.dtype
    )
    if not bool(np.isfinite(scales).all()):
        raise ModelError(f"{source.scales.path}: tensor {source.scales.name!r} is not finite")
    by_row = scales[np.arange(first, first + len(raw)) // rows - first_block]
    whole = raw.shape[1] // columns * columns
    blocks = out[:, :whole].reshape(len(raw), whole // columns, columns)
    np.multiply(blocks, by_row[:, : blocks.shape[1], None], out=blocks)
    if whole < raw.shape[1]:
        out[:, whole:] *= by_row[:, -1:]
    return out
