"""Writing GGUF files: the header from plain values, the tensors as a stream of byte chunks.

The file grows under a temporary name beside its target and is renamed when complete, so that a
reader never sees half a file. Who writes tensors in another order takes the layout of the file and
fills it himself.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import FormatError
from ..formats import by_name
from .types import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    NUMBERS,
    TYPE_ARRAY,
    TYPE_BOOL,
    TYPE_STRING,
    VERSIONS,
    Value,
)

_NUMBER_IDS = {dtype: type_id for type_id, dtype in NUMBERS.items() if type_id != TYPE_BOOL}
#: Bytes left free on the disk beside the file, so that a full file system is never our doing.
_DISK_RESERVE_BYTES = 64 << 20

Chunk = bytes | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: its name, element format and shape (outermost first)."""

    name: str
    format: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of data, without padding."""
        return by_name(self.format).n_bytes(self.shape)


@dataclass(frozen=True)
class FileLayout:
    """One file before its tensors are written.

    Attributes:
        header: its first bytes, padded to where the data begins.
        offsets: first byte of each tensor in the file; between them are zeros.
        n_bytes: size of the whole file.
    """

    header: bytes
    offsets: tuple[int, ...]
    n_bytes: int


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Value | np.generic],
    tensors: Sequence[NewTensor],
    chunks: Callable[[NewTensor], Iterable[Chunk]],
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> int:
    """Write one GGUF file (version 3, little-endian) and return its size in bytes.

    Args:
        metadata: keys in file order. Python integers become uint32 (int32 where negative, uint64
            where larger), floats float32; NumPy scalars and arrays keep their type.
        tensors: in file order.
        chunks: gives the bytes of a tensor, in pieces of any size that add up to its ``n_bytes``.
        on_bytes: called with the length of each chunk after it was written.

    Raises:
        OSError: with ``errno.ENOSPC`` before writing where the disk has too little space, and
            whatever the file system reports.
        FormatError: a format is unknown, a value has no GGUF type, or the chunks of a tensor do
            not add up to its size.
    """
    path = Path(path)
    layout = lay_out(metadata, tensors)
    check_disk(path, layout.n_bytes)
    with _replacing(path) as file:
        file.write(layout.header)
        for tensor in tensors:
            _write_tensor(file, tensor, chunks(tensor), on_bytes)
    return layout.n_bytes


def lay_out(metadata: Mapping[str, Value | np.generic], tensors: Sequence[NewTensor]) -> FileLayout:
    """The header of a file, and where its tensors go. Arguments and errors as in write_gguf."""
    header = _header(metadata, tensors)
    offsets: list[int] = []
    end = len(header)
    for tensor in tensors:
        offsets.append(end)
        end += _padded(tensor.n_bytes)
    return FileLayout(header, tuple(offsets), end)


def shard_path(path: Path, index: int, count: int) -> Path:
    """Where shard ``index``, from 0, of ``count`` goes: ``name-00001-of-0000N.gguf``.

    One shard alone keeps the name ``path``.
    """
    if count == 1:
        return path
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{index + 1:05d}-of-{count:05d}.gguf")


def shard_keys(index: int, count: int, n_tensors: int) -> dict[str, np.generic]:
    """The keys that join shards; none for one shard alone."""
    if count == 1:
        return {}
    return {
        "split.no": np.uint16(index),
        "split.count": np.uint16(count),
        "split.tensors.count": np.int32(n_tensors),
    }


def _write_tensor(
    file: BinaryIO,
    tensor: NewTensor,
    chunks: Iterable[Chunk],
    on_bytes: Callable[[int], None] | None,
) -> None:
    written = 0
    for chunk in chunks:
        view = memoryview(chunk) if isinstance(chunk, bytes) else chunk.data
        file.write(view)
        written += view.nbytes
        if on_bytes is not None:
            on_bytes(view.nbytes)
    if written != tensor.n_bytes:
        raise FormatError(
            f"tensor {tensor.name!r}: {written} bytes came; {tensor.format} "
            f"{list(tensor.shape)} has {tensor.n_bytes}"
        )
    file.write(bytes(_padded(written) - written))


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _header(metadata: Mapping[str, Value | np.generic], tensors: Sequence[NewTensor]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", max(VERSIONS), len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(key, value)]
    offset = 0
    for tensor in tensors:
        rank = len(tensor.shape)
        parts += [
            _string(tensor.name),
            struct.pack(f"<I{rank}Q", rank, *reversed(tensor.shape)),
            struct.pack("<IQ", by_name(tensor.format).gguf_type, offset),
        ]
        offset += _padded(tensor.n_bytes)
    header = b"".join(parts)
    return header + bytes(_padded(len(header)) - len(header))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Value | np.generic) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", TYPE_BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", TYPE_STRING) + _string(value)
    if isinstance(value, tuple):
        head = struct.pack("<IIQ", TYPE_ARRAY, TYPE_STRING, len(value))
        return head + b"".join(map(_string, value))
    if isinstance(value, np.ndarray):
        head = struct.pack("<IIQ", TYPE_ARRAY, _number_id(key, value.dtype), value.size)
        return head + value.astype(value.dtype.newbyteorder("<")).tobytes()
    number = _as_number(value)
    return struct.pack("<I", _number_id(key, number.dtype)) + number.tobytes()


def _as_number(value: int | float | np.generic) -> np.generic:
    if isinstance(value, np.generic):
        return value
    if isinstance(value, float):
        return np.float32(value)
    if value < 0:
        return np.int32(value)
    return np.uint32(value) if value < 1 << 32 else np.uint64(value)


def _number_id(key: str, dtype: np.dtype[Any]) -> int:
    type_id = TYPE_BOOL if dtype == np.bool_ else _NUMBER_IDS.get(dtype.newbyteorder("<"))
    if type_id is None:
        raise FormatError(f"metadata {key!r}: GGUF has no type for {dtype}")
    return type_id


def check_disk(path: Path, n_bytes: int) -> None:
    """Raise OSError (ENOSPC) unless the disk of ``path`` has room for ``n_bytes`` and a reserve."""
    free = shutil.disk_usage(path.absolute().parent).free
    if n_bytes + _DISK_RESERVE_BYTES > free:
        needed, reserve = n_bytes / 1e6, _DISK_RESERVE_BYTES / 1e6
        raise OSError(
            errno.ENOSPC,
            f"needs {needed:,.1f} MB and {reserve:,.0f} MB to spare, but its disk has "
            f"{free / 1e6:,.1f} MB free",
            str(path),
        )


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name ``path`` when the block ends well, and vanishes otherwise."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
