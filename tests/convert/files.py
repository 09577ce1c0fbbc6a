"""What a GGUF file holds, through an independent reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize


def floats(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """All tensors, decoded."""
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type)
        for tensor in GGUFReader(path).tensors
    }


def raw(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Format, shape and bytes of all tensors."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            tuple(int(extent) for extent in tensor.shape),
            tensor.data.tobytes(),
        )
        for tensor in GGUFReader(path).tensors
    }


def keys(path: Path) -> dict[str, tuple[tuple[GGUFValueType, ...], Any]]:
    """Types and values of all metadata."""
    return {
        name: (tuple(field.types), field.contents())
        for name, field in GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }
