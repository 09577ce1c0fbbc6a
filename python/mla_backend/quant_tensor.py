"""Weights in the quantized formats, outside of any model: encode, view, decode."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mla_backend import _core
from mla_backend.errors import FormatError, ShapeError
from mla_backend.formats import by_name

Array: TypeAlias = npt.NDArray[Any]
F32: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]

_FLOATS = ("float64", "float32", "float16", "bfloat16")


class QuantTensor:
    """Numbers in one of the weight formats: shape [.., K], rows of whole blocks.

    Indexing the leading dims with integers and slices gives views of the same memory.
    """

    __slots__ = ("_format", "_rows")

    def __init__(self, rows: Bytes, format: str) -> None:
        """Wrap ``rows``: uint8 [.., bytes of a row], each row contiguous, kept and not copied.

        Raises FormatError or ShapeError where they are no rows of ``format``.
        """
        self._format = by_name(format)
        block_bytes = self._format.block_bytes
        if rows.dtype != np.uint8 or rows.ndim < 1 or rows.shape[-1] % block_bytes:
            raise FormatError(
                f"{self.format}: rows are {rows.dtype} {list(rows.shape)}, accepted are uint8 "
                f"[.., a multiple of {block_bytes}]"
            )
        if rows.shape[-1] and rows.strides[-1] != 1:
            raise ShapeError(f"{self.format}: the bytes of a row must be contiguous")
        self._rows = rows

    @classmethod
    def from_bytes(
        cls, data: bytes | bytearray | memoryview | Bytes, format: str, shape: tuple[int, ...]
    ) -> QuantTensor:
        """View contiguous encoded ``data`` as a tensor of ``shape``, without a copy.

        Raises FormatError where the last extent is no multiple of the block, ShapeError where the
        size differs from what the shape needs.
        """
        known = by_name(format)
        needed = known.n_bytes(shape)
        flat = np.frombuffer(data, np.uint8)
        if flat.size != needed or any(extent < 0 for extent in shape):
            raise ShapeError(f"{known.name} {list(shape)} takes {needed} bytes, {flat.size} came")
        row_bytes = shape[-1] // known.block_elems * known.block_bytes
        return cls(flat.reshape(*shape[:-1], row_bytes), known.name)

    @property
    def format(self) -> str:
        """Name of the format, as in GGUF: "Q4_K"."""
        return self._format.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents in elements, outermost first."""
        n_blocks = self._rows.shape[-1] // self._format.block_bytes
        return (*self._rows.shape[:-1], n_blocks * self._format.block_elems)

    @property
    def n_bytes(self) -> int:
        """Bytes of the encoded numbers."""
        return self._rows.nbytes

    @property
    def rows(self) -> Bytes:
        """The encoded rows, uint8 [.., bytes of a row]: a view."""
        return self._rows

    def to_bytes(self) -> bytes:
        """Return the encoded numbers, contiguous."""
        return self._rows.tobytes()

    def dequantize(self) -> F32:
        """Decode to a new float32 array of the same shape."""
        flat = np.ascontiguousarray(self._rows.reshape(-1, self._rows.shape[-1]))
        wide: F32 = _core.dequantize(flat, self.format, self.shape[-1])
        return wide.reshape(self.shape)

    def __getitem__(self, key: int | slice | tuple[int | slice, ...]) -> QuantTensor:
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) >= self._rows.ndim:
            raise ShapeError(f"{self!r}: only dims before the last can be indexed")
        if not all(isinstance(k, int | np.integer | slice) for k in keys):
            raise ShapeError(f"{self!r}: indices are integers and slices, {key!r} came")
        return QuantTensor(self._rows[keys], self.format)

    def __repr__(self) -> str:
        return f"QuantTensor({self.format}, {list(self.shape)})"


def quantize(array: Array, format: str) -> QuantTensor:
    """Encode a float array [.., K] as ``format`` ("q4_k", in any case), rounding as GGUF files do.

    float64 is rounded to float32 first. Raises FormatError where K is no multiple of the block or
    the array is not of floats, ShapeError where it has no dim.
    """
    known = by_name(format)
    if array.dtype.name not in _FLOATS:
        raise FormatError(f"quantize: {array.dtype} came, accepted are floats")
    known.n_bytes(array.shape)  # checks the blocks
    wide = np.ascontiguousarray(array, np.float32).reshape(-1, array.shape[-1])
    rows = _core.quantize(wide, known.name)
    return QuantTensor(rows.reshape(*array.shape[:-1], rows.shape[-1]), known.name)
