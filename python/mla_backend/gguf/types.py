"""What a GGUF file contains, and the numbers its header uses for it.

Shapes are outermost first everywhere in this package; GGUF's reversed order ends in this folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

#: A metadata value. Arrays of numbers are read-only NumPy copies, arrays of strings are tuples.
Value = bool | int | float | str | tuple[str, ...] | npt.NDArray[Any]

MAGIC = b"GGUF"
#: Version 1 had 32-bit lengths and was replaced within days; 2 and 3 differ only in byte order.
VERSIONS = (2, 3)
#: Layout of the quantized blocks (``general.quantization_version``); 2 since their scales are
#: half floats.
QUANTIZATION_VERSION = 2
DEFAULT_ALIGNMENT = 32

TYPE_BOOL, TYPE_STRING, TYPE_ARRAY = 7, 8, 9
#: Metadata type id -> little-endian element type.
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    TYPE_BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}

#: Tensor types that exist but are not in the format table: named in errors, never decoded.
UNSUPPORTED_TENSOR_TYPES: dict[int, str] = {
    4: "Q4_2 (removed from GGUF)",
    5: "Q4_3 (removed from GGUF)",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    31: "Q4_0_4_4 (removed from GGUF)",
    32: "Q4_0_4_8 (removed from GGUF)",
    33: "Q4_0_8_8 (removed from GGUF)",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4 (removed from GGUF)",
    37: "IQ4_NL_4_8 (removed from GGUF)",
    38: "IQ4_NL_8_8 (removed from GGUF)",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: its name in the file.
        format: name of its element format, as in ``mla_backend.formats``, e.g. ``"Q4_K"``.
        shape: extents in elements, outermost first; the last one is contiguous.
        shard: index into ``GGUFFile.paths``.
        offset: first byte, counted from the start of that shard.
        n_bytes: bytes of data, without padding.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file, or of all shards of a split one.

    Attributes:
        paths: the shards in order, as named (symbolic links are kept).
        shard_bytes: size of each shard when it was read.
        version: GGUF version of the first shard.
        alignment: alignment of tensor data in bytes, of the first shard.
        metadata: keys of the first shard, in file order.
        tensors: tensors of all shards by name, in file order.
    """

    paths: tuple[Path, ...]
    shard_bytes: tuple[int, ...]
    version: int
    alignment: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]

    @property
    def n_bytes(self) -> int:
        """Size of all shards together, in bytes."""
        return sum(self.shard_bytes)
