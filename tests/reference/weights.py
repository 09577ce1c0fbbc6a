"""Random weights of every format, with their values decoded by the `gguf` package."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from mla_backend.ops import QuantTensor, Weight

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Where in a block its float16 scales and mins are, in bytes.
_HALVES = {
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
QUANTIZED = tuple(_HALVES)
FORMATS = (*FLOATS, *QUANTIZED)


def block_elems(format: str) -> int:
    """Elements per block; 1 for floats."""
    return 1 if format in FLOATS else int(GGML_QUANT_SIZES[GGMLQuantizationType[format]][0])


def random_weight(
    format: str, shape: tuple[int, ...], seed: int = 0, fill: int | None = None
) -> tuple[Weight, npt.NDArray[np.float32]]:
    """A weight of ``shape`` with every bit pattern of its blocks but for tame scales, and what it
    decodes to. ``fill``: this byte everywhere but for the scales."""
    rng = np.random.default_rng(seed)
    if format in FLOATS:
        numbers = rng.normal(size=shape).astype(FLOATS[format])
        return numbers, numbers.astype(np.float32)
    kind = GGMLQuantizationType[format]
    elems, size = GGML_QUANT_SIZES[kind]
    n_blocks = int(np.prod(shape)) // elems
    blocks = rng.integers(0, 256, (n_blocks, size), np.uint8)
    if fill is not None:
        blocks[:] = fill
    for at in _HALVES[format]:
        scales = rng.uniform(0.5, 1.5, n_blocks) * rng.choice([-0.01, 0.01], n_blocks)
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    rows = blocks.reshape(*shape[:-1], shape[-1] // elems * size)
    values = dequantize(blocks, kind) if n_blocks else np.zeros(0)
    return QuantTensor(rows, format), values.astype(np.float32).reshape(shape)
