"""The safetensors container: a header of names, types, shapes and byte ranges, then the bytes.

Layout: u64 length of the header, the header as a JSON object, the data. Ranges count from the
start of the data. Tensors are read by plain reads, never through a mapping: a failing disk or a
file that shrinks is then an error of the call instead of the end of the process.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import ModelError

#: Bytes per element of each type in a header.
DTYPE_BYTES: Final = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}

_LENGTH: Final = struct.Struct("<Q")
# The format's own limit. A longer one is damage, not size.
_HEADER_LIMIT_BYTES: Final = 100_000_000
_METADATA: Final = "__metadata__"
# The kernel reads at most this much per call.
_READ_LIMIT_BYTES: Final = 1 << 30

_FOREIGN: Final[tuple[tuple[bytes, str], ...]] = (
    (b"version https://git-lfs", "a Git LFS pointer: the weights themselves were not downloaded"),
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?)"),
    (b"<", "HTML or XML: a web page was saved in place of the weights"),
    (b"GGUF", "a GGUF file"),
    (b"\0\0\0\0\0\0\0\0", "zeros (an unfinished download?)"),
)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        name: its name in the checkpoint.
        dtype: a key of ``DTYPE_BYTES``.
        shape: outermost first, rows contiguous.
        path: the file.
        offset: its first byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the outermost dimension."""
        return prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one file, in the order of their bytes.

    Raises:
        ModelError: the file cannot be read, or is damaged: the message names the file, the field,
            what was found and what is accepted.
    """
    try:
        with path.open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            first = file.read(64)
            length = _header_length(path, first, n_bytes)
            file.seek(_LENGTH.size)
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    entries = _parse(path, raw)
    start = _LENGTH.size + length
    tensors = [_tensor(path, start, n_bytes, name, entry) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.n_bytes))
    _check_ranges(path, start, n_bytes, tensors)
    return {tensor.name: tensor for tensor in tensors}


def read_rows(tensor: StoredTensor, first: int, count: int) -> npt.NDArray[np.uint8]:
    """Bytes of ``count`` entries of the outermost dimension -> uint8 [count, row_bytes].

    Other threads run meanwhile.

    Raises:
        OSError: the disk fails.
        ModelError: the file shrank since its header was read.
    """
    out = np.empty((count, tensor.row_bytes), np.uint8)
    view = memoryview(out).cast("B") if out.size else memoryview(b"")
    position = tensor.offset + first * tensor.row_bytes
    try:
        with tensor.path.open("rb", buffering=0) as file:
            while view:
                got = os.preadv(file.fileno(), [view[:_READ_LIMIT_BYTES]], position)
                if got == 0:
                    raise ModelError(f"{tensor.path}: the file shrank while it was read")
                view, position = view[got:], position + got
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(tensor.path)) from error
    return out


def _fail(path: Path, what: str, found: str, accepted: str) -> NoReturn:
    raise ModelError(f"{path}: {what}: found {found}; accepted: {accepted}")


def _header_length(path: Path, first: bytes, n_bytes: int) -> int:
    length = int(_LENGTH.unpack_from(first)[0]) if len(first) >= _LENGTH.size else 0
    if 0 < length <= min(n_bytes - _LENGTH.size, _HEADER_LIMIT_BYTES):
        return length
    for magic, text in _FOREIGN:
        if first.startswith(magic):
            _fail(path, "header", text, "a safetensors file")
    if length == 0:
        _fail(path, "header", f"{n_bytes} bytes without one", "a safetensors file")
    if length > _HEADER_LIMIT_BYTES:
        _fail(path, "header length", f"{length} bytes", f"at most {_HEADER_LIMIT_BYTES}")
    _fail(
        path,
        "header length",
        f"{length} bytes in a file of {n_bytes}",
        "a complete file (is the download truncated?)",
    )


def _parse(path: Path, raw: bytes) -> dict[str, dict[str, Any]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            _fail(path, "header", f"{twice!r} more than once", "every name once")
        return out

    try:
        entries = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        _fail(path, "header", f"no valid JSON ({error})", "a JSON object")
    if not isinstance(entries, dict):
        _fail(path, "header", f"JSON of type {type(entries).__name__}", "a JSON object")
    entries.pop(_METADATA, None)
    return entries


def _tensor(path: Path, start: int, n_bytes: int, name: str, entry: Any) -> StoredTensor:
    what = f"tensor {name!r}"
    if not isinstance(entry, dict):
        _fail(path, what, repr(entry)[:60], "an object with dtype, shape and data_offsets")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if dtype not in DTYPE_BYTES:
        _fail(path, f"{what}: dtype", repr(dtype)[:60], ", ".join(DTYPE_BYTES))
    if not _are_naturals(shape):
        _fail(path, f"{what}: shape", repr(shape)[:60], "a list of non-negative integers")
    if not _are_naturals(offsets) or len(offsets) != 2:
        _fail(path, f"{what}: data_offsets", repr(offsets)[:60], "two non-negative integers")
    begin, end = offsets
    size = prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != size:
        _fail(path, f"{what}: data_offsets", f"{end - begin} bytes", f"{size}, as its shape has")
    if start + end > n_bytes:
        _fail(
            path,
            f"{what}: data_offsets",
            f"an end at byte {start + end} of a file of {n_bytes}",
            "a complete file (is the download truncated?)",
        )
    return StoredTensor(name, dtype, tuple(shape), path, start + begin)


def _are_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_ranges(path: Path, start: int, n_bytes: int, tensors: list[StoredTensor]) -> None:
    """Tensors follow each other without gap or overlap and fill the file."""
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            kind = "a gap before it" if tensor.offset > position else "an overlap with another"
            _fail(path, f"tensor {tensor.name!r}: data_offsets", kind, "tensors one after another")
        position += tensor.n_bytes
    if position != n_bytes:
        _fail(path, "data", f"{n_bytes - position} bytes after the last tensor", "none")
