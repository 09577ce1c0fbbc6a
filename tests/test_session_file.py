"""Saved sessions: every way in which the file can be wrong."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mla_backend.errors import SessionError
from mla_backend.session_file import SavedSession, read_session, write_session

STATE = SavedSession("model", "f16", 3, [5, 6, 7], {"seed": 1})
CELLS = np.arange(2 * 3 * 10, dtype=np.uint8).reshape(2, 3, 10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "session"
    write_session(path, STATE, CELLS)
    return path


def with_checksum(body: bytes) -> bytes:
    return body + hashlib.blake2b(body, digest_size=32).digest()


def test_round_trip(path: Path) -> None:
    state, cells = read_session(path)
    assert state == STATE
    np.testing.assert_array_equal(cells, CELLS.reshape(-1))


def test_bytes_are_as_documented(path: Path) -> None:
    header = msgspec.json.encode(STATE)
    body = b"MLASESS1" + struct.pack("<I", len(header)) + header + CELLS.tobytes()
    assert path.read_bytes() == with_checksum(body)


def test_every_length_but_the_whole_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(SessionError, match=str(path)):
            read_session(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(SessionError, match="truncated or damaged"):
        read_session(path)


def test_every_changed_byte_is_found(path: Path) -> None:
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(SessionError):
            read_session(path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"MLASESS1", "truncated"),
        (b"MLASESS1" + struct.pack("<I", 5) + b"{}", "5 bytes, which are not here"),
        (b"MLASESS1" + struct.pack("<I", 2) + b"{}", "header cannot be read"),
        (b"MLASESS1" + struct.pack("<I", 2) + b"[}", "header cannot be read"),
        (b"GGUF" + bytes(100), "no saved session"),
        (b"", "no saved session"),
    ],
)
def test_wrong_contents_with_the_right_checksum(tmp_path: Path, body: bytes, message: str) -> None:
    path = tmp_path / "session"
    path.write_bytes(with_checksum(body))
    with pytest.raises(SessionError, match=message):
        read_session(path)


@given(st.binary(max_size=200))
def test_any_header(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any-header"
    path.write_bytes(with_checksum(b"MLASESS1" + struct.pack("<I", len(header)) + header))
    with pytest.raises(SessionError):
        read_session(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="missing: cannot be read: No such file"):
        read_session(tmp_path / "missing")


def test_unwritable_directory(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="cannot be written"):
        write_session(tmp_path / "missing" / "session", STATE, CELLS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk")
def test_full_disk_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(handle: int) -> None:
        with open("/dev/full", "wb", buffering=0) as disk:
            disk.write(b"x")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SessionError, match="cannot be written: No space left"):
        write_session(path, SavedSession("other", "f16", 0, []), CELLS)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
