"""Damaged and foreign files: one ModelError that names file, field, found and accepted."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from mla_backend.errors import ModelError
from mla_backend.gguf import read_gguf
from mla_backend.gguf.cursor import HEADER_LIMIT_BYTES

from tests.gguf.build import ARRAY, BOOL, F32, STRING, U32, File, Tensor, Typed, build, tiny_model


def refusal(folder: Path, data: bytes | File) -> str:
    """The message that reading these bytes ends with."""
    path = folder / "bad.gguf"
    path.write_bytes(build(data) if isinstance(data, File) else data)
    with pytest.raises(ModelError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert str(path) in message
    return message.replace(str(path), "PATH")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"GGML" + bytes(60), "b'GGML'"),
        (b"FUGG" + bytes(60), "bytes swapped"),
        (b"lmgg" + bytes(60), "GGML file"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32"}}', "safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n <html>", "web page"),
        (b'{"error":"not found"}', "JSON"),
        (b"\x80\x02}q\x00", "pickle"),
        (bytes(64), "zeros"),
        (b"GG", "b'GG'"),
    ],
)
def test_wrong_magic(tmp_path: Path, data: bytes, found: str) -> None:
    message = refusal(tmp_path, data)
    assert message.startswith("PATH: magic: found ")
    assert found in message
    assert message.endswith("accepted: b'GGUF'")


@pytest.mark.parametrize(
    ("version", "found"),
    [(1, "1"), (4, "4"), (0, "0"), (0x03000000, "3 in big-endian"), (2**32 - 1, "4294967295")],
)
def test_wrong_version(tmp_path: Path, version: int, found: str) -> None:
    message = refusal(tmp_path, File(version=version))
    assert message.startswith(f"PATH: version: found {found}")


def test_empty_file(tmp_path: Path) -> None:
    assert "empty" in refusal(tmp_path, b"")


def test_truncated_anywhere_in_the_header(tmp_path: Path) -> None:
    """Every prefix of a file with all kinds of fields is refused, at each single byte."""
    data = build(
        File(
            {"a": 1, "b": True, "c": "text", "d": [1, 2], "e": ["x", "yz"], "f": 0.5},
            {"t": Tensor((2, 32), 8), "u": Tensor((3,))},
        )
    )
    fields = set()
    for length in range(1, len(data) - 32 + 12):  # the last 20 bytes are padding of the data
        message = refusal(tmp_path, data[:length])
        fields.add(message.split(": found")[0])
    for field in (
        "version",
        "tensor count",
        "metadata key count",
        "metadata 'e': element type",
        "metadata 'd': element count",
        "metadata 'e'[1]",
        "metadata 'e'[1]: length",
        "metadata 'f'",
        "name of tensor 0",
        "tensor 't': dimension count",
        "tensor 't': dimensions",
        "tensor 't': type",
        "tensor 't': offset",
        "tensor 't': data",
        "tensor 'u': data",
    ):
        assert f"PATH: {field}" in fields
    (tmp_path / "bad.gguf").write_bytes(data)
    assert len(read_gguf(tmp_path / "bad.gguf").tensors) == 2


@pytest.mark.parametrize("count", [2**64 - 1, 2**63, 2**40, 1000])
def test_absurd_counts_allocate_nothing(tmp_path: Path, count: int) -> None:
    lengths = struct.pack("<Q", count)
    head = b"GGUF" + struct.pack("<I", 3)
    key = struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"k"
    cases = {
        "tensor count": head + lengths + bytes(64),
        "metadata key count": head + bytes(8) + lengths + bytes(64),
        "metadata key 0": head + struct.pack("<QQ", 0, 1) + lengths + bytes(64),
        "metadata 'k'": head + key + struct.pack("<I", STRING) + lengths + bytes(64),
        "metadata 'k': element count": head
        + key
        + struct.pack("<II", ARRAY, STRING)
        + lengths
        + bytes(64),
        "metadata 'k': element": head + key + struct.pack("<II", ARRAY, F32) + lengths + bytes(64),
        "metadata 'k'[0]": head + key + struct.pack("<IIQ", ARRAY, STRING, 1) + lengths + bytes(64),
    }
    tracemalloc.start()
    try:
        for field, data in cases.items():
            assert f"PATH: {field}" in refusal(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_long_lengths_inside_a_large_file_allocate_nothing(tmp_path: Path) -> None:
    """A sparse file of 8 GiB: the lengths fit the file, but no header is that long."""
    key = struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"k"
    head = b"GGUF" + struct.pack("<I", 3) + key
    path = tmp_path / "large.gguf"
    for tail in (
        struct.pack("<IQ", STRING, 6 << 30),
        struct.pack("<IIQ", ARRAY, F32, 1 << 30),
        struct.pack("<IIQQ", ARRAY, STRING, 1, 6 << 30),
    ):
        path.write_bytes(head + tail)
        os.truncate(path, 8 << 30)
        tracemalloc.start()
        start = time.perf_counter()
        with pytest.raises(ModelError, match=f"at most {HEADER_LIMIT_BYTES}"):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        tracemalloc.stop()
        assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Typed(13, 0), "metadata 'k': type: found 13; accepted: 0 to 12"),
        (Typed(BOOL, 2), "metadata 'k': found 2 as a boolean; accepted: 0 or 1"),
        (Typed(ARRAY, [0, 1, 7], BOOL), "metadata 'k': found 7 as a boolean"),
        (b"ab\xff", r"metadata 'k': found invalid UTF-8 (invalid start byte) in b'ab\xff'"),
        ([b"ok", b"\xe2\x82"], r"metadata 'k'[1]: found invalid UTF-8"),
    ],
)
def test_bad_values(tmp_path: Path, item: object, message: str) -> None:
    if isinstance(item, Typed) and item.type_id == 13:
        data = build(File({"k": 7})).replace(struct.pack("<II", U32, 7), struct.pack("<II", 13, 7))
        assert message in refusal(tmp_path, data)
    else:
        assert message in refusal(tmp_path, File({"k": item}))


@pytest.mark.parametrize(("item_type", "found"), [(9, "9 (arrays in an array)"), (13, "13")])
def test_bad_element_type(tmp_path: Path, item_type: int, found: str) -> None:
    data = build(File({"k": [7]}))
    old = struct.pack("<IIQ", ARRAY, 5, 1)
    assert old in data
    message = refusal(tmp_path, data.replace(old, struct.pack("<IIQ", ARRAY, item_type, 1)))
    assert f"metadata 'k': element type: found {found}; accepted: 0 to 8" in message


def test_names(tmp_path: Path) -> None:
    tensor = Tensor((8,))
    assert "'k' a second time" in refusal(tmp_path, File([("k", 1), ("k", 2)]))
    assert "'t' a second time" in refusal(tmp_path, File({}, [("t", tensor), ("t", tensor)]))
    assert "metadata key 0: found an empty name" in refusal(tmp_path, File({"": 1}))
    assert "name of tensor 0: found an empty name" in refusal(tmp_path, File({}, {"": tensor}))
    assert "metadata key 0: found invalid UTF-8" in refusal(tmp_path, File([(b"\xc3", 1)]))
    assert "name of tensor 0: found invalid" in refusal(tmp_path, File({}, [(b"\xc3", tensor)]))
    assert "metadata key 0: length: found 70000" in refusal(tmp_path, File({"k" * 70000: 1}))


@pytest.mark.parametrize("alignment", [0, 1, 4, 24, 33, 2**31, -32, "32", 32.0, True, [32]])
def test_bad_alignment(tmp_path: Path, alignment: object) -> None:
    item = Typed(11, alignment) if alignment == -32 else alignment
    message = refusal(tmp_path, File({"general.alignment": item}))
    assert "metadata 'general.alignment': found" in message
    assert "accepted: a power of two" in message


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor(()), "dimension count: found 0; accepted: 1 to 4"),
        (Tensor((1,) * 5), "dimension count: found 5; accepted: 1 to 4"),
        (Tensor((4, 0)), "shape: found [4, 0]"),
        (Tensor((2**32, 2**32), data=b""), "shape: found [4294967296, 4294967296]"),
        (Tensor((2**63,), data=b""), "shape: found [9223372036854775808]"),
        (Tensor((2**62,), data=b""), "data: found bytes"),
        (Tensor((2, 40), 8), "innermost extent: found 40; accepted: a multiple of 32"),
        (Tensor((2, 128), 12), "innermost extent: found 128; accepted: a multiple of 256"),
        (Tensor((8,), offset=8), "offset: found 8; accepted: a multiple of the alignment, 32"),
        (Tensor((8,), offset=2**63), "data: found bytes"),
        (Tensor((8,), offset=2**64 - 32), "data: found bytes"),
        (Tensor((8,), 16), "type: found IQ2_XXS, type 16; accepted: F32, F16, BF16, Q4_0"),
        (Tensor((8,), 39), "type: found MXFP4, type 39"),
        (Tensor((8,), 4), "type: found Q4_2 (removed from GGUF), type 4"),
        (Tensor((8,), 25), "type: found I16, type 25"),
        (Tensor((8,), 99), "type: found unknown type 99"),
    ],
)
def test_bad_tensor(tmp_path: Path, tensor: Tensor, message: str) -> None:
    assert f"PATH: tensor 't': {message}" in refusal(tmp_path, File({}, {"t": tensor}))


def test_overlapping_tensors(tmp_path: Path) -> None:
    file = File({}, {"a": Tensor((64,)), "b": Tensor((8,)), "c": Tensor((8,), offset=32)})
    assert "tensors 'a' and 'c': found overlapping data" in refusal(tmp_path, file)


def test_gaps_between_tensors_are_fine(tmp_path: Path) -> None:
    file = File({}, {"a": Tensor((8,), data=bytes(4096)), "b": Tensor((8,), offset=4096)})
    (tmp_path / "m.gguf").write_bytes(build(file))
    assert len(read_gguf(tmp_path / "m.gguf").tensors) == 2


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.gguf: no such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match=r"m-00001-of-00002\.gguf: no such file"):
        read_gguf(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ModelError, match="found a directory; accepted: the path of a"):
        read_gguf(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be read: Not a directory"):
        read_gguf(tmp_path / "file" / "model.gguf")
    with pytest.raises(ModelError, match="not a valid path"):
        read_gguf("a\0b.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelError, match="found a pipe, socket or device"):
        read_gguf(tmp_path / "pipe.gguf")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    with pytest.raises(ModelError, match=r"loop\.gguf: cannot be read"):
        read_gguf(tmp_path / "loop.gguf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(build(tiny_model()))
    path.chmod(0)
    with pytest.raises(ModelError, match="no permission to read"):
        read_gguf(path)


def test_permission_error_is_translated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "m.gguf"
    path.write_bytes(build(tiny_model()))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match=r"m\.gguf: no permission to read this file"):
        read_gguf(path)


def test_shrinking_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is taken first; a file cut right after that gives an error as well."""
    path = tmp_path / "m.gguf"
    path.write_bytes(build(tiny_model()))
    status = path.stat()
    os.truncate(path, 100)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: status)
    with pytest.raises(ModelError, match="a file that shrank while it was read"):
        read_gguf(path)
