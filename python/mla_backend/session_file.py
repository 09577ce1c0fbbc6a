"""Saved sessions: a header, the cells of the cache, and a checksum over both.

8 bytes   magic "MLASESS1"
4 bytes   header length, little endian
header    JSON of SavedSession
cells     uint8 [layers, positions, bytes of a cell], as the cache holds them
32 bytes  BLAKE2b of everything before
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from mla_backend.errors import SessionError

_MAGIC: Final = b"MLASESS1"
_DIGEST_BYTES: Final = 32
_LENGTH: Final = struct.Struct("<I")


class SavedSession(msgspec.Struct, frozen=True):
    """The header. ``tokens`` holds one id per saved position."""

    fingerprint: str
    cache_type: str
    first_position: int
    tokens: list[int]
    sampler_state: dict[str, Any] | None = None


def write_session(path: Path, state: SavedSession, cells: npt.NDArray[np.uint8]) -> None:
    """Write under a temporary name, then rename: a full disk leaves the old file as it was."""
    header = msgspec.json.encode(state)
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise SessionError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            for part in (_MAGIC, _LENGTH.pack(len(header)), header, np.ascontiguousarray(cells)):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise SessionError(f"{path}: cannot be written: {error.strerror}") from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_session(path: Path) -> tuple[SavedSession, npt.NDArray[np.uint8]]:
    """Read and verify a saved session -> its header, and its cells as flat bytes.

    Raises SessionError naming the file and what is wrong.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SessionError(f"{path}: cannot be read: {error.strerror}") from error
    if not data.startswith(_MAGIC):
        raise SessionError(f"{path}: no saved session (it does not begin with {_MAGIC.decode()})")
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != digest:
        raise SessionError(f"{path}: truncated or damaged (the checksum differs)")
    begin = len(_MAGIC) + _LENGTH.size
    if len(body) < begin:
        raise SessionError(f"{path}: truncated (there is no header)")
    (length,) = _LENGTH.unpack_from(body, len(_MAGIC))
    if len(body) < begin + length:
        raise SessionError(f"{path}: the header is said to have {length} bytes, which are not here")
    try:
        state = msgspec.json.decode(body[begin : begin + length], type=SavedSession)
    except msgspec.MsgspecError as error:
        raise SessionError(f"{path}: the header cannot be read: {error}") from error
    cells = np.frombuffer(body, np.uint8, offset=begin + length)
    return state, cells
