"""Random models: what the files contain, that seeds fix them, and how wrong requests end."""

from __future__ import annotations

import errno
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from mla_backend.convert.mixes import mix_named
from mla_backend.errors import FormatError, UsageError
from mla_backend.formats import by_name
from mla_backend.gguf import read_gguf
from mla_backend.gguf.writer import NewTensor, write_gguf
from mla_backend.synth import MIXES, SHAPES, shape_named, write_model
from mla_backend.synth.tensors import plan_tensors
from mla_backend.synth.vocabulary import make_vocabulary
from mla_backend.synth.weights import WeightSource
from small_models import small_model

#: Parameters in billions, as published, within 3 %.
PUBLISHED = {"v2-lite": 15.7, "v2": 236.0, "v3": 671.0, "kimi-k2": 1026.0, "moonlight": 16.0}
#: Largest error of one rounding, relative to the largest weight of a tensor.
ROUNDING = {"F32": 0.0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.01, "Q6_K": 0.05, "Q5_0": 0.08}


def floats(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """All tensors of a file, decoded by an independent reader."""
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type)
        for tensor in GGUFReader(path).tensors
    }


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_size(name: str) -> None:
    plans = plan_tensors(SHAPES[name], mix_named("q4_k_m"), "split")
    n_params = sum(math.prod(plan.shape) for plan in plans) / 1e9
    assert all(by_name(plan.format).n_bytes(plan.shape) > 0 for plan in plans)
    if name in PUBLISHED:
        assert n_params == pytest.approx(PUBLISHED[name], rel=0.03)


@pytest.mark.parametrize(
    ("shape", "fixture", "type", "layout"),
    [
        ("tiny-v2", "tiny-v2/gguf/tiny-v2-Q4_K_M.gguf", "q4_k_m", "split"),
        ("tiny-v2", "tiny-v2/gguf/tiny-v2-legacy-Q4_K_M.gguf", "q4_k_m", "legacy"),
        ("tiny-v2", "tiny-v2/gguf/tiny-v2-Q8_0.gguf", "q8_0", "split"),
        ("tiny-v2", "tiny-v2/gguf/tiny-v2-Q2_K.gguf", "q2_k", "split"),
        ("tiny-v2", "tiny-v2/gguf/tiny-v2-IQ4_XS.gguf", "iq4_xs", "split"),
        ("tiny-v2", "tiny-v2/gguf/tiny-v2-BF16.gguf", "bf16", "split"),
        ("tiny-v3", "tiny-v3/gguf/tiny-v3-Q4_K_M.gguf", "q4_k_m", "split"),
        ("tiny-v3", "tiny-v3/gguf/tiny-v3-Q3_K_M.gguf", "q3_k_m", "split"),
    ],
)
def test_files_equal_converted_ones(
    fixtures_dir: Path, shape: str, fixture: str, type: str, layout: str
) -> None:
    ours, theirs = read_gguf(small_model(shape, type, layout)), read_gguf(fixtures_dir / fixture)
    assert {(t.name, t.format, t.shape) for t in ours.tensors.values()} == {
        (t.name, t.format, t.shape) for t in theirs.tensors.values()
    }
    assert set(theirs.metadata) - set(ours.metadata) <= {"general.size_label"}
    assert set(ours.metadata) <= set(theirs.metadata)
    for key, value in theirs.metadata.items():
        if key.startswith("deepseek2."):
            assert ours.metadata[key] == pytest.approx(value), key


@pytest.mark.parametrize(
    ("type", "d_model"),
    # Short rows are drawn one by one, long ones strung together.
    [*((type, 256) for type in MIXES), ("bf16", 1024), ("q8_0", 1024), ("q4_k_m", 1024)],
)
def test_every_type_rounds_the_same_model(type: str, d_model: int) -> None:
    changes = {"d_model": d_model, "n_layer": 2, "vocab": 400}
    exact = floats(small_model("tiny-v2", **changes))
    rounded = floats(small_model("tiny-v2", type, **changes))
    formats = {
        t.name: t.format
        for t in read_gguf(small_model("tiny-v2", type, **changes)).tensors.values()
    }
    assert exact.keys() == rounded.keys()
    for name, values in exact.items():
        assert np.isfinite(rounded[name]).all(), name
        bound = ROUNDING.get(formats[name], 0.5) * np.abs(values).max()
        assert np.abs(rounded[name] - values).max() <= bound, (name, formats[name])


@pytest.mark.parametrize("shape", ["tiny-v2", "tiny-v3"])
def test_legacy_layout_holds_the_same_model(shape: str) -> None:
    split, legacy = floats(small_model(shape)), floats(small_model(shape, layout="legacy"))
    s = SHAPES[shape]
    for layer in range(s.n_layer):
        block = f"blk.{layer}."
        joint = legacy.pop(block + "attn_kv_b.weight")
        joint = joint.reshape(s.n_head, s.nope + s.value, s.kv_lora_rank)
        keys = split.pop(block + "attn_k_b.weight").swapaxes(1, 2)
        np.testing.assert_array_equal(joint[:, : s.nope], keys)
        np.testing.assert_array_equal(joint[:, s.nope :], split.pop(block + "attn_v_b.weight"))
    assert split.keys() == legacy.keys()
    for name, values in split.items():
        np.testing.assert_array_equal(values, legacy[name])


def test_weights_keep_activations_in_size() -> None:
    s = SHAPES["tiny-v2"]
    weights = floats(small_model())
    assert weights["blk.1.ffn_up_exps.weight"].std() == pytest.approx(s.d_model**-0.5, rel=0.05)
    assert weights["blk.1.attn_k_b.weight"].std() == pytest.approx(s.kv_lora_rank**-0.5, rel=0.05)
    assert weights["output_norm.weight"].mean() == pytest.approx(1.0, abs=0.05)
    output = weights["output.weight"]
    assert len(np.unique(output, axis=0)) == len(output)


def test_seed_decides(tmp_path: Path) -> None:
    data = []
    for run, seed in enumerate((1, 1, 2)):
        directory = tmp_path / str(run)
        directory.mkdir()
        (path,) = write_model(directory / "m.gguf", "tiny-v3", type="q4_k_m", seed=seed)
        data.append(path.read_bytes())
    assert data[0] == data[1] != data[2]


def test_shards_join_to_the_same_model(tmp_path: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    paths = write_model(
        tmp_path / "m.gguf",
        "tiny-v2",
        type="f32",
        shards=3,
        on_progress=lambda *now: progress.append(now),
    )
    assert [path.name for path in paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    joined, whole = read_gguf(paths[1]), read_gguf(small_model())
    assert set(joined.tensors) == set(whole.tensors)
    assert {tensor.shard for tensor in joined.tensors.values()} == {0, 1, 2}
    total = sum(tensor.n_bytes for tensor in whole.tensors.values())
    assert progress[-1] == ("write", total, total)
    assert progress == sorted(progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths]


def test_shape_overrides() -> None:
    cut = shape_named("v3", layers=2, experts=16, vocab=2048, context=64)
    assert (cut.n_layer, cut.n_layer_dense, cut.vocab, cut.context) == (2, 1, 2048, 64)
    assert (cut.n_expert, cut.n_expert_used, cut.n_group, cut.n_group_used) == (16, 8, 8, 4)
    odd = shape_named("v3", experts=9)
    assert (odd.n_group, odd.n_group_used, odd.n_expert_used) == (1, 1, 8)
    few = shape_named("v3", experts=8)  # one a group would have no second best to be judged by
    assert (few.n_group, few.n_group_used, few.n_expert_used) == (1, 1, 8)
    dense = shape_named("v2-lite", layers=3, experts=0)
    assert (dense.n_expert, dense.n_layer_dense) == (0, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 0, "n_layer_dense": 0}, "at least 1 layer"),
        ({"n_layer_dense": 4}, "no more dense ones"),
        ({"n_expert_used": 7}, "1 to all of them"),
        ({"n_group": 4}, "equal groups"),
        ({"n_group": 3, "n_group_used": 1}, "groups hold 2"),
    ],
)
def test_contradicting_shapes_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(SHAPES["tiny-v2"], **changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shape": "tiny-v9"}, "tiny-v9.*tiny-v2"),
        ({"type": "q9_k"}, "q9_k.*q4_k_m"),
        ({"layout": "joint"}, "joint.*legacy"),
        ({"shards": 0}, "0 shards"),
        ({"shards": 45}, "45 shards for 44"),
        ({"shape": replace(SHAPES["tiny-v2"], vocab=200)}, "200 tokens"),
    ],
)
def test_wrong_requests_are_refused(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        write_model(tmp_path / "m.gguf", **{"shape": "tiny-v2", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(OSError, match="free") as caught:
        write_model(tmp_path / "m.gguf", "tiny-v2")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    target.write_bytes(b"before")
    tensor = NewTensor("t", "F32", (2, 8))
    with pytest.raises(FormatError, match=r"'t': 60 bytes came; F32 .* has 64"):
        write_gguf(target, {}, [tensor], lambda _: [bytes(60)])
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert target.read_bytes() == b"before"


def test_metadata_round_trip(tmp_path: Path) -> None:
    keys = {
        "yes": True,
        "small": 7,
        "negative": -7,
        "large": 1 << 40,
        "real": 0.5,
        "text": "ä\0ö",
        "strings": ("", "<｜x｜>"),
        "array": np.arange(5, dtype=np.int16),
        "exact": np.float64(1e300),
    }
    path = tmp_path / "m.gguf"
    size = write_gguf(path, keys, [], lambda _: [])
    assert path.stat().st_size == size
    back = read_gguf(path).metadata
    assert list(back) == list(keys)
    for key, value in keys.items():
        np.testing.assert_array_equal(back[key], value)
    with pytest.raises(FormatError, match=r"'odd'.*complex128"):
        write_gguf(path, {"odd": np.zeros(2, complex)}, [], lambda _: [])


@pytest.mark.parametrize(("n_tokens", "pre"), [(400, "deepseek-llm"), (1024, "deepseek-v3")])
def test_vocabulary(n_tokens: int, pre: str) -> None:
    vocabulary = make_vocabulary(n_tokens, pre)
    assert len(vocabulary.tokens) == len(vocabulary.types) == n_tokens
    assert len(set(vocabulary.tokens)) == n_tokens
    assert vocabulary.types[vocabulary.bos] == vocabulary.types[vocabulary.eos] == 3
    rank = {token: number for number, token in enumerate(vocabulary.tokens)}
    for merge in vocabulary.merges:
        left, right = merge.split(" ")
        assert max(rank[left], rank[right]) < rank[left + right]
    n_unused = Counter(vocabulary.types)[5]
    assert all(token.startswith("[PAD") for token in vocabulary.tokens[n_tokens - n_unused :])


def test_largest_vocabulary_has_distinct_tokens() -> None:
    assert len(set(make_vocabulary(163840, "deepseek-v3").tokens)) == 163840


def test_memory_does_not_grow_with_the_tensor() -> None:
    plans = plan_tensors(SHAPES["v3"], mix_named("f16"), "split")
    embedding = next(plan for plan in plans if plan.name == "token_embd.weight")
    chunk = next(iter(WeightSource(0).chunks(embedding)))
    assert memoryview(chunk).nbytes <= 32 << 20
