"""The reader against files of other writers: values, shapes and positions must agree."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_backend.errors import ModelError
from mla_backend.gguf import GGUFFile, read_gguf

from tests.gguf.build import (
    BLOCKS,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    File,
    Tensor,
    Typed,
    array,
    build,
    tiny_model,
)

FIXTURES = os.environ.get("MLA_FIXTURES", "")
FILES = sorted(Path(FIXTURES).glob("*/gguf/*.gguf")) if FIXTURES else []


def written(folder: Path, file: File, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(build(file))
    return path


def assert_same_as_reference(file: GGUFFile, path: Path) -> None:
    """Every key and tensor as the gguf package reads them."""
    gguf = pytest.importorskip("gguf")
    reference = gguf.GGUFReader(path)
    keys = [key for key in reference.fields if not key.startswith("GGUF.")]
    assert list(file.metadata) == keys
    for key in keys:
        theirs, ours = reference.fields[key].contents(), file.metadata[key]
        if isinstance(ours, np.ndarray):
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert (list(ours) if isinstance(ours, tuple) else ours) == theirs, key
            assert isinstance(ours, tuple) or type(ours) is type(theirs), key
    assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert info.format == tensor.tensor_type.name
        assert (info.offset, info.n_bytes) == (tensor.data_offset, tensor.n_bytes)


@pytest.mark.skipif(not FILES, reason="MLA_FIXTURES is not set")
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.stem))
def test_fixture_agrees_with_reference_reader(path: Path) -> None:
    file = read_gguf(path)
    assert file.paths == (path,)
    assert file.n_bytes == path.stat().st_size
    assert_same_as_reference(file, path)


def test_file_of_reference_writer(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "w.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_custom_alignment(128)
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -5)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve ▁Ġ 文")
    writer.add_array("names", ["a", "", "Ġb"])
    writer.add_array("ids", [1, -2, 3])
    writer.add_array("scores", [0.5, 1.5])
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 2, 64)).astype(np.float32)
    writer.add_tensor("a.weight", weights)
    writer.add_tensor("b.weight", weights[0].astype(np.float16))
    quantized = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path)
    assert_same_as_reference(file, path)
    assert (file.version, file.alignment) == (3, 128)
    info = file.tensors["a.weight"]
    data = path.read_bytes()[info.offset : info.offset + info.n_bytes]
    np.testing.assert_array_equal(np.frombuffer(data, "<f4").reshape(info.shape), weights)


@pytest.mark.parametrize("layout", ["split", "legacy"])
def test_own_builder_agrees_with_reference_reader(tmp_path: Path, layout: str) -> None:
    path = written(tmp_path, tiny_model(layout))
    assert_same_as_reference(read_gguf(path), path)


@pytest.mark.parametrize("version", [2, 3])
def test_versions(tmp_path: Path, version: int) -> None:
    assert read_gguf(written(tmp_path, File(version=version))).version == version


def test_accepts_text_paths_and_keeps_links(tmp_path: Path) -> None:
    blob = written(tmp_path, tiny_model(), "3f2a")
    link = tmp_path / "model.gguf"
    link.symlink_to(blob)
    file = read_gguf(str(link))
    assert file.paths == (link,)


def test_result_cannot_be_changed(tmp_path: Path) -> None:
    file = read_gguf(written(tmp_path, File({"a": [1, 2]}, {"t": Tensor((1,))})))
    with pytest.raises(TypeError):
        file.metadata["b"] = 1  # type: ignore[index]
    with pytest.raises(TypeError):
        del file.tensors["t"]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="read-only"):
        file.metadata["a"][0] = 3  # type: ignore[index]


def test_arrays_outlive_a_truncated_file(tmp_path: Path) -> None:
    path = written(tmp_path, File({"a": list(range(10_000))}))
    file = read_gguf(path)
    os.truncate(path, 0)
    np.testing.assert_array_equal(file.metadata["a"], np.arange(10_000))


def test_sizes_beyond_32_bits(tmp_path: Path) -> None:
    """A sparse file with an expert tensor of 4.3e9 elements, and one behind it."""
    big = Tensor((256, 4097, 4096), 1, data=b"")
    big_bytes = 256 * 4097 * 4096 * 2
    small = Tensor((4,), 0, data=b"", offset=big_bytes)
    path = written(tmp_path, File({}, {"big": big, "small": small}))
    end = path.stat().st_size + big_bytes + small.n_bytes
    os.truncate(path, end)
    file = read_gguf(path)
    assert file.tensors["big"].n_bytes == big_bytes > 2**33
    assert file.tensors["small"].offset == file.tensors["big"].offset + big_bytes
    os.truncate(path, end - 1)
    with pytest.raises(ModelError, match=r"tensor 'small': data"):
        read_gguf(path)


def test_header_larger_than_first_window(tmp_path: Path) -> None:
    tokens = [f"token number {index}" for index in range(100_000)]
    path = written(tmp_path, File({"a": tokens, "b": list(range(500_000)), "c": "x" * 3_000_000}))
    metadata = read_gguf(path).metadata
    assert list(metadata["a"]) == tokens  # type: ignore[arg-type]
    np.testing.assert_array_equal(metadata["b"], np.arange(500_000))
    assert metadata["c"] == "x" * 3_000_000


# Round trip ---------------------------------------------------------------------------------------

_INTEGERS = {
    U8: (0, 2**8 - 1), I8: (-(2**7), 2**7 - 1), U16: (0, 2**16 - 1), I16: (-(2**15), 2**15 - 1),
    U32: (0, 2**32 - 1), I32: (-(2**31), 2**31 - 1), U64: (0, 2**64 - 1),
    I64: (-(2**63), 2**63 - 1),
}  # fmt: skip
_DTYPES = {
    U8: "u1", I8: "i1", U16: "u2", I16: "i2", U32: "u4", I32: "i4", U64: "u8", I64: "i8",
    F32: "f4", F64: "f8", BOOL: "?",
}  # fmt: skip
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_KEY = _TEXT.filter(lambda key: key and not key.startswith(("split.", "general.")))


def _scalars(type_id: int) -> st.SearchStrategy[Any]:
    if type_id == BOOL:
        return st.booleans()
    if type_id in (F32, F64):
        return st.floats(width=32 if type_id == F32 else 64, allow_nan=False)
    return st.integers(*_INTEGERS[type_id])


def _values() -> st.SearchStrategy[Any]:
    scalar = st.sampled_from(list(_DTYPES)).flatmap(
        lambda type_id: st.builds(Typed, st.just(type_id), _scalars(type_id))
    )
    numbers = st.sampled_from(list(_DTYPES)).flatmap(
        lambda type_id: st.builds(
            Typed, st.just(9), st.lists(_scalars(type_id), max_size=6), st.just(type_id)
        )
    )
    strings = st.builds(Typed, st.just(9), st.lists(_TEXT, max_size=6), st.just(8))
    return st.one_of(_TEXT, scalar, numbers, strings)


def _tensors() -> st.SearchStrategy[Tensor]:
    return st.builds(
        lambda type_id, outer, blocks: Tensor((*outer, blocks * BLOCKS[type_id][0]), type_id),
        st.sampled_from(sorted(BLOCKS)),
        st.lists(st.integers(1, 4), max_size=3),
        st.integers(1, 3),
    )


@settings(max_examples=150, deadline=None)
@given(
    metadata=st.dictionaries(_KEY, _values(), max_size=8),
    tensors=st.dictionaries(_TEXT.filter(bool), _tensors(), max_size=6),
    alignment=st.sampled_from([8, 32, 64, 4096]),
    version=st.sampled_from([2, 3]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    metadata: dict[str, Any],
    tensors: dict[str, Tensor],
    alignment: int,
    version: int,
) -> None:
    metadata["general.alignment"] = alignment
    path = tmp_path_factory.getbasetemp() / "round_trip.gguf"
    path.write_bytes(build(File(metadata, tensors, alignment=alignment, version=version)))
    file = read_gguf(path)
    assert (file.version, file.alignment) == (version, alignment)
    assert list(file.metadata) == list(metadata)
    for key, expected in metadata.items():
        _assert_value(file.metadata[key], expected)
    assert list(file.tensors) == list(tensors)
    for name, tensor in tensors.items():
        info = file.tensors[name]
        assert (info.shape, info.n_bytes) == (tuple(tensor.shape), tensor.n_bytes)
        assert info.offset % alignment == 0


def _assert_value(ours: Any, expected: Any) -> None:
    if not isinstance(expected, Typed):
        assert ours == expected
    elif expected.item_type is None:
        assert ours == expected.value
        assert type(ours) is type(expected.value)
    elif expected.item_type == 8:
        assert ours == tuple(expected.value)
    else:
        wanted = np.array(expected.value, _DTYPES[expected.item_type])
        assert ours.dtype == wanted.dtype
        np.testing.assert_array_equal(ours, wanted)


# Split files --------------------------------------------------------------------------------------


def shards(folder: Path, count: int = 3, **keys: Any) -> list[Path]:
    """``count`` shards of one tensor each; ``keys`` replace the split keys of all of them."""
    paths = []
    for index in range(count):
        split = {"split.no": index, "split.count": count, "split.tensors.count": count} | keys
        metadata = {key: item for key, item in split.items() if item is not None}
        if index == 0:
            metadata["general.name"] = "first"
        tensor = Tensor((8,), data=array(np.full(8, index), "<f4"))
        file = File(metadata, {f"t{index}": tensor})
        paths.append(written(folder, file, f"m-{index + 1:05d}-of-{count:05d}.gguf"))
    return paths


@pytest.mark.parametrize("named", [0, 1, 2])
def test_any_shard_may_be_named(tmp_path: Path, named: int) -> None:
    paths = shards(tmp_path)
    file = read_gguf(paths[named])
    assert file.paths == tuple(paths)
    assert list(file.tensors) == ["t0", "t1", "t2"]
    assert file.metadata["general.name"] == "first"
    assert file.n_bytes == sum(path.stat().st_size for path in paths)
    for index, info in enumerate(file.tensors.values()):
        assert info.shard == index
        data = file.paths[index].read_bytes()[info.offset : info.offset + 4]
        assert struct.unpack("<f", data) == (index,)


def test_shards_without_split_keys(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"split.no": None, "split.count": None, "split.tensors.count": None}
    paths = shards(tmp_path, **keys)
    assert len(read_gguf(paths[1]).tensors) == 3


def test_siblings_are_beside_the_link_not_the_blob(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    links = []
    for index, path in enumerate(shards(tmp_path)):
        path.rename(blobs / f"hash{index}")
        links.append(snapshot / path.name)
        links[-1].symlink_to(f"../blobs/hash{index}")
    assert read_gguf(links[2]).paths == tuple(links)


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    paths = shards(tmp_path, 4)
    paths[1].unlink()
    paths[3].unlink()
    for named in (paths[0], paths[1]):
        with pytest.raises(ModelError) as caught:
            read_gguf(named)
        assert paths[1].name in str(caught.value)
        assert f"2 are missing in {tmp_path}" in str(caught.value)
        assert paths[3].name in str(caught.value)


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    os.truncate(paths[1], paths[1].stat().st_size - 40)
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf: tensor 't1': data"):
        read_gguf(paths[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split.count": 2}, r"'split.count': found 2, but the name stands for 3"),
        ({"split.no": 0}, r"m-00002-of.*'split.no': found 0; accepted: 1"),
        ({"split.tensors.count": 7}, r"'split.tensors.count': found 7, .* hold 3 tensors"),
        ({"split.count": "three"}, r"'split.count': found 'three'; accepted: an integer"),
    ],
)
def test_split_keys_must_agree(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_gguf(shards(tmp_path, **keys)[0])


def test_renamed_shard(tmp_path: Path) -> None:
    path = shards(tmp_path)[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match=r"'split.count': found 3, but the name stands for 1"):
        read_gguf(path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    paths = [
        written(tmp_path, File({}, {"t": Tensor((8,))}), f"m-{index:05d}-of-00002.gguf")
        for index in (1, 2)
    ]
    with pytest.raises(ModelError, match=r"00002\.gguf: tensor 't' is also in m-00001"):
        read_gguf(paths[0])


@pytest.mark.parametrize("name", ["m-00004-of-00003.gguf", "m-00000-of-00003.gguf"])
def test_impossible_shard_number(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"shard number \d of 3; accepted: 1 to 3"):
        read_gguf(tmp_path / name)
