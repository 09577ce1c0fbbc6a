"""One shard's header: magic, version, counts, metadata, tensor infos, padding, data.

Layout (little-endian): magic "GGUF", u32 version, u64 tensor count, u64 key count; per key a
string, a u32 type and its value; per tensor a string, u32 dimension count, u64 extents innermost
first, u32 type, u64 offset into the data section, which starts at the next aligned byte. Strings
are a u64 length and UTF-8.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import formats
from ..errors import FormatError, ModelError
from .cursor import Cursor
from .types import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    NUMBERS,
    TYPE_ARRAY,
    TYPE_BOOL,
    TYPE_STRING,
    UNSUPPORTED_TENSOR_TYPES,
    VERSIONS,
    TensorInfo,
    Value,
)

_NAME_LIMIT_BYTES = 65535
_MAX_DIMS = 4
_INT64_MAX = (1 << 63) - 1
# Least bytes of an entry: an empty name's length, a type, the smallest value; and a name's length,
# a dimension count, one extent, a type, an offset.
_KEY_LEAST_BYTES = 8 + 4 + 1
_TENSOR_LEAST_BYTES = 8 + 4 + 8 + 4 + 8

_FOREIGN_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?)"),
    (b"version https://git-lfs", "a Git LFS pointer: the model itself was not downloaded"),
    (b"<", "HTML or XML: a web page was saved in place of the model"),
    (b"{", "JSON"),
    (b"\x80\x02", "a Python pickle (an old PyTorch checkpoint?)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"lmgg", "a GGML file, which GGUF replaced in 2023"),
    (b"fmgg", "a GGML file, which GGUF replaced in 2023"),
    (b"tjgg", "a GGML file, which GGUF replaced in 2023"),
    (b"FUGG", "a GGUF file with its bytes swapped"),
    (b"\0\0\0\0", "zeros (an unfinished download?)"),
)


@dataclass(frozen=True)
class Header:
    """One shard: fields as in GGUFFile, tensors in file order with absolute offsets."""

    version: int
    alignment: int
    metadata: dict[str, Value]
    tensors: list[TensorInfo]


def read_header(file: BinaryIO, path: Path, n_bytes: int, shard: int) -> Header:
    """Parse and validate the header of ``file``, which has ``n_bytes`` bytes.

    Raises:
        ModelError: naming file, field, what was found and what is accepted.
    """
    cursor = Cursor(file, path, n_bytes)
    version = _read_preamble(cursor)
    n_tensors = cursor.count("tensor count", _TENSOR_LEAST_BYTES)
    n_keys = cursor.count("metadata key count", _KEY_LEAST_BYTES)
    metadata = _read_metadata(cursor, n_keys)
    alignment = _alignment(cursor, metadata)
    raw = _read_tensor_infos(cursor, n_tensors)
    data_start = -(-cursor.pos // alignment) * alignment
    tensors = [_place(cursor, entry, shard, data_start, alignment) for entry in raw]
    _check_overlaps(path, tensors)
    return Header(version, alignment, metadata, tensors)


def read_metadata(file: BinaryIO, path: Path, n_bytes: int) -> dict[str, Value | np.generic]:
    """The metadata with numbers as NumPy scalars of their stored type, for files to be copied.

    Raises:
        ModelError: as read_header.
    """
    cursor = Cursor(file, path, n_bytes)
    _read_preamble(cursor)
    cursor.count("tensor count", _TENSOR_LEAST_BYTES)
    n_keys = cursor.count("metadata key count", _KEY_LEAST_BYTES)
    types: dict[str, int] = {}
    metadata = _read_metadata(cursor, n_keys, types)
    return {
        key: NUMBERS[types[key]].type(value) if type(value) in (int, float) else value
        for key, value in metadata.items()
    }


def _read_preamble(cursor: Cursor) -> int:
    if cursor.n_bytes == 0:
        raise ModelError(f"{cursor.path}: the file is empty; accepted: a GGUF file")
    first = cursor.peek(64)
    if first[:4] != MAGIC:
        cursor.fail("magic", _describe(first), "b'GGUF'")
    cursor.u32("magic")
    version = cursor.u32("version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        found = str(version)
        if swapped in range(1, 256):
            found = f"{swapped} in big-endian byte order"
        cursor.fail("version", found, "2 or 3, little-endian")
    return version


def _describe(first: bytes) -> str:
    for magic, name in _FOREIGN_MAGIC:
        if first.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(magic):
            return name
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") < 1 << 32:
        return "a safetensors file; convert it to GGUF first"
    return repr(first[:4])


def _read_metadata(
    cursor: Cursor, n_keys: int, types: dict[str, int] | None = None
) -> dict[str, Value]:
    """Values by key; ``types`` gets the type id of each."""
    metadata: dict[str, Value] = {}
    for index in range(n_keys):
        key = cursor.string(f"metadata key {index}", _NAME_LIMIT_BYTES)
        if not key:
            cursor.fail(f"metadata key {index}", "an empty name", "a name")
        if key in metadata:
            cursor.fail(f"metadata key {index}", f"{key!r} a second time", "each key once")
        type_id = cursor.u32(f"metadata {key!r}: type")
        if types is not None:
            types[key] = type_id
        metadata[key] = _read_value(cursor, key, type_id)
    return metadata


def _read_value(cursor: Cursor, key: str, type_id: int) -> Value:
    what = f"metadata {key!r}"
    if type_id == TYPE_STRING:
        return cursor.string(what)
    if type_id == TYPE_ARRAY:
        return _read_array(cursor, what)
    if type_id not in NUMBERS:
        cursor.fail(f"{what}: type", str(type_id), "0 to 12")
    number = cursor.number(NUMBERS[type_id], what)
    if type_id != TYPE_BOOL:
        return number
    if number not in (0, 1):
        cursor.fail(what, f"{number} as a boolean", "0 or 1")
    return bool(number)


def _read_array(cursor: Cursor, what: str) -> Value:
    type_id = cursor.u32(f"{what}: element type")
    if type_id == TYPE_STRING:
        return cursor.strings(cursor.count(f"{what}: element count", 8), what)
    if type_id == TYPE_ARRAY:
        cursor.fail(f"{what}: element type", "9 (arrays in an array)", "0 to 8 and 10 to 12")
    if type_id not in NUMBERS:
        cursor.fail(f"{what}: element type", str(type_id), "0 to 8 and 10 to 12")
    dtype = NUMBERS[type_id]
    count = cursor.count(f"{what}: element count", dtype.itemsize)
    array = cursor.numbers(count, dtype, what)
    if type_id != TYPE_BOOL:
        return array
    if array.size and array.max() > 1:
        cursor.fail(what, f"{array.max()} as a boolean", "0 or 1")
    return array.view(np.bool_)


def _alignment(cursor: Cursor, metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    power_of_two = type(value) is int and value > 0 and value & (value - 1) == 0
    # GGUF asks for a multiple of 8; the upper bound keeps the arithmetic sane.
    if not power_of_two or not 8 <= int(value) <= 1 << 30:  # type: ignore[arg-type]
        cursor.fail("metadata 'general.alignment'", repr(value), "a power of two from 8 to 2^30")
    return int(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _RawInfo:
    name: str
    shape: tuple[int, ...]  # outermost first
    type_id: int
    offset: int  # from the start of the data section


def _read_tensor_infos(cursor: Cursor, n_tensors: int) -> list[_RawInfo]:
    raw: list[_RawInfo] = []
    names: set[str] = set()
    for index in range(n_tensors):
        name = cursor.string(f"name of tensor {index}", _NAME_LIMIT_BYTES)
        if not name:
            cursor.fail(f"name of tensor {index}", "an empty name", "a name")
        if name in names:
            cursor.fail(f"name of tensor {index}", f"{name!r} a second time", "each name once")
        names.add(name)
        n_dims = cursor.u32(f"tensor {name!r}: dimension count")
        if not 1 <= n_dims <= _MAX_DIMS:
            cursor.fail(f"tensor {name!r}: dimension count", str(n_dims), f"1 to {_MAX_DIMS}")
        dims = [cursor.u64(f"tensor {name!r}: dimensions") for _ in range(n_dims)]
        type_id = cursor.u32(f"tensor {name!r}: type")
        offset = cursor.u64(f"tensor {name!r}: offset")
        raw.append(_RawInfo(name, tuple(reversed(dims)), type_id, offset))
    return raw


def _place(
    cursor: Cursor, raw: _RawInfo, shard: int, data_start: int, alignment: int
) -> TensorInfo:
    """Check one tensor against its format and the file, and make its offset absolute."""
    what = f"tensor {raw.name!r}"
    n_elems = prod(raw.shape)
    if not 0 < n_elems <= _INT64_MAX:
        cursor.fail(f"{what}: shape", str(list(raw.shape)), "positive extents, below 2^63 elements")
    format_ = _format(cursor, raw)
    if raw.shape[-1] % format_.block_elems:
        cursor.fail(
            f"{what}: innermost extent",
            str(raw.shape[-1]),
            f"a multiple of {format_.block_elems}, the block of {format_.name}",
        )
    n_bytes = n_elems // format_.block_elems * format_.block_bytes
    if raw.offset % alignment:
        cursor.fail(f"{what}: offset", str(raw.offset), f"a multiple of the alignment, {alignment}")
    start = data_start + raw.offset
    if start + n_bytes > cursor.n_bytes:
        cursor.fail(
            f"{what}: data",
            f"bytes {start} to {start + n_bytes} of a file of {cursor.n_bytes}",
            "data inside the file (is the download truncated?)",
        )
    return TensorInfo(raw.name, format_.name, raw.shape, shard, start, n_bytes)


def _format(cursor: Cursor, raw: _RawInfo) -> formats.Format:
    try:
        return formats.by_gguf_type(raw.type_id)
    except FormatError as error:
        known = UNSUPPORTED_TENSOR_TYPES.get(raw.type_id)
        found = f"{known}, type {raw.type_id}" if known else f"unknown type {raw.type_id}"
        raise ModelError(
            f"{cursor.path}: tensor {raw.name!r}: type: found {found}; "
            f"accepted: {', '.join(row.name for row in formats.FORMATS)}"
        ) from error


def _check_overlaps(path: Path, tensors: list[TensorInfo]) -> None:
    ordered = sorted(tensors, key=lambda info: info.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.n_bytes > after.offset:
            raise ModelError(
                f"{path}: tensors {before.name!r} and {after.name!r}: found overlapping data "
                f"(the first ends at byte {before.offset + before.n_bytes}, the second starts at "
                f"{after.offset}); accepted: tensors apart from each other"
            )
