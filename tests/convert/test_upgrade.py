"""Legacy files become split ones: what is lossless is lossless, what is not is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from convert.checkpoints import HEADS, LATENT, NOPE, VALUE, checkpoint
from convert.files import floats, keys, raw
from mla_backend.convert.from_hf import ConvertOptions, convert
from mla_backend.convert.upgrade import Requantized, plan_upgrade, upgrade
from mla_backend.errors import ModelError, UsageError
from mla_backend.gguf import read_gguf
from small_models import small_model


def legacy(tmp_path: Path, outtype: str) -> Path:
    hf = checkpoint().write(tmp_path / "hf")
    out = tmp_path / "old.gguf"
    convert(hf, out, ConvertOptions(outtype=outtype, layout="legacy"))
    return out


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
def test_floats_are_what_a_conversion_gives(tmp_path: Path, outtype: str) -> None:
    old, new, split = legacy(tmp_path, outtype), tmp_path / "new.gguf", tmp_path / "split.gguf"
    plan = upgrade(old, new)
    convert(tmp_path / "hf", split, ConvertOptions(outtype=outtype))
    assert plan.requantized == ()
    assert raw(new) == raw(split)
    assert keys(new) == keys(split)


@pytest.mark.parametrize("k_b_format", ["Q8_0", "f16", "F32"])
def test_quantized(tmp_path: Path, k_b_format: str) -> None:
    old, new = legacy(tmp_path, "q8_0"), tmp_path / "new.gguf"
    plan = upgrade(old, new, k_b_format=k_b_format, threads=2)
    assert plan.requantized == (Requantized(3, "Q8_0", k_b_format.upper()),)
    before, after = floats(old), floats(new)
    old_bytes, new_bytes = raw(old), raw(new)
    for layer in range(3):
        joint = before[f"blk.{layer}.attn_kv_b.weight"].reshape(HEADS, NOPE + VALUE, LATENT)
        np.testing.assert_array_equal(after[f"blk.{layer}.attn_v_b.weight"], joint[:, NOPE:])
        k_b = after[f"blk.{layer}.attn_k_b.weight"]
        error = np.abs(k_b - joint[:, :NOPE].swapaxes(1, 2)).max()
        assert error == 0.0 if k_b_format == "F32" else error < 2e-3
    for name in old_bytes.keys() & new_bytes.keys():
        assert new_bytes[name] == old_bytes[name], name
    assert {name.split(".")[2] for name in new_bytes.keys() - old_bytes.keys()} == {
        "attn_k_b",
        "attn_v_b",
    }


def test_value_rows_keep_their_bytes(tmp_path: Path) -> None:
    old = small_model("tiny-v2", "q4_k_m", "legacy")
    new = tmp_path / "new.gguf"
    upgrade(old, new)
    infos = read_gguf(old).tensors, read_gguf(new).tensors
    name = "blk.1.attn_kv_b.weight"
    assert infos[1]["blk.1.attn_v_b.weight"].format == infos[0][name].format
    n_head = infos[1]["blk.1.attn_v_b.weight"].shape[0]
    joint = np.frombuffer(raw(old)[name][2], np.uint8).reshape(n_head, 2, -1)
    assert raw(new)["blk.1.attn_v_b.weight"][2] == joint[:, 1].tobytes()


def test_metadata_is_rewritten(tmp_path: Path) -> None:
    old = small_model("tiny-v3", "f16", "legacy")
    new = tmp_path / "new.gguf"
    upgrade(old, new)
    before, after = keys(old), keys(new)
    changed = {key: value for key, (_, value) in after.items() if before.get(key) != after[key]}
    assert changed == {
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.key_length": 256 + 64,
        "deepseek2.attention.value_length": 256,
        "deepseek2.attention.key_length_mla": 192,
        "deepseek2.attention.value_length_mla": 128,
    }
    assert before.keys() <= after.keys()


def test_gating_is_made_explicit(tmp_path: Path) -> None:
    new = tmp_path / "new.gguf"
    upgrade(small_model("tiny-v2", "f16", "legacy"), new)
    assert keys(new)["deepseek2.expert_gating_func"][1] == 1


def test_split_files_in_and_out(tmp_path: Path) -> None:
    old = small_model("tiny-v2", "f16", "legacy", shards=3)
    whole, parts = tmp_path / "whole.gguf", tmp_path / "p.gguf"
    upgrade(old, whole)
    plan = upgrade(old, parts, max_shard_bytes=2_000_000)
    assert len(plan.output.paths) > 1
    joined = {name: value for path in plan.output.paths for name, value in raw(path).items()}
    assert joined == raw(whole)
    assert not [key for key in keys(whole) if key.startswith("split.")]
    assert read_gguf(plan.output.paths[0]).tensors.keys() == read_gguf(whole).tensors.keys()


def test_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="split one already"):
        plan_upgrade(small_model("tiny-v2", "f16"), tmp_path / "n.gguf")


def test_wrong_arguments(tmp_path: Path) -> None:
    old = tmp_path / "old.gguf"
    shutil.copy(small_model("tiny-v2", "f16", "legacy"), old)
    with pytest.raises(UsageError, match=r"'q4_k'.*Q8_0, F16, BF16, F32"):
        plan_upgrade(old, tmp_path / "n.gguf", k_b_format="q4_k")
    with pytest.raises(UsageError, match="cannot replace the old one"):
        plan_upgrade(old, old)
