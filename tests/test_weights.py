"""Declared weights: names and shapes, and one message for everything that does not fit."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from mla_backend.config import ModelConfig, config_from_gguf
from mla_backend.errors import ModelError
from mla_backend.gguf import GGUFFile, TensorInfo, read_gguf
from mla_backend.weights import check, declare

from tests.gguf.build import File, Tensor, build, changed, tiny_model

FIXTURES = os.environ.get("MLA_FIXTURES", "")
FILES = sorted(Path(FIXTURES).glob("*/gguf/*.gguf")) if FIXTURES else []


def load(folder: Path, file: File) -> tuple[ModelConfig, GGUFFile]:
    path = folder / "model.gguf"
    path.write_bytes(build(file))
    found = read_gguf(path)
    return config_from_gguf(found), found


def checked(folder: Path, file: File) -> dict[str, TensorInfo]:
    return check(*load(folder, file))


def refusal(folder: Path, file: File) -> str:
    config, found = load(folder, file)
    with pytest.raises(ModelError) as caught:
        check(config, found)
    message = str(caught.value)
    assert message.startswith(f"{folder}/model.gguf: ")
    return message


@pytest.mark.skipif(not FILES, reason="MLA_FIXTURES is not set")
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.stem))
def test_fixtures_have_exactly_the_declared_weights(path: Path) -> None:
    file = read_gguf(path)
    found = check(config_from_gguf(file), file)
    assert set(found) == set(file.tensors)
    assert all(found[name] == info for name, info in file.tensors.items())


@pytest.mark.parametrize("layout", ["split", "legacy"])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_declared_order_and_roles(tmp_path: Path, layout: str, sigmoid: bool) -> None:
    config, file = load(tmp_path, tiny_model(layout, sigmoid=sigmoid))
    specs = declare(config)
    assert {spec.name for spec in specs} == set(file.tensors)
    assert specs[0].name == "token_embd.weight"
    assert [spec.name for spec in specs[-2:]] == ["output_norm.weight", "output.weight"]
    roles = {spec.name: spec.role for spec in specs}
    assert roles["blk.1.ffn_gate_exps.weight"] == "experts"
    assert roles["blk.1.ffn_gate_inp.weight"] == "router"
    assert roles["blk.0.attn_kv_a_norm.weight"] == "norm"
    if layout == "split":
        assert roles["blk.0.attn_k_b.weight"] == "k_b"
    else:
        assert roles["blk.0.attn_kv_b.weight"] == "kv_b"
    assert ("blk.1.exp_probs_b.bias" in roles) == sigmoid
    assert ("blk.1.attn_q_b.weight" in roles) == sigmoid


def test_full_size_model_needs_64_bits(tmp_path: Path) -> None:
    config, _ = load(tmp_path, tiny_model(sigmoid=True))
    assert config.moe is not None
    large = replace(
        config,
        n_layer=61,
        n_layer_dense=3,
        d_model=7168,
        moe=replace(config.moe, n_expert=256, d_ff=2048),
    )
    shapes = {spec.name: spec.shape for spec in declare(large)}
    assert shapes["blk.60.ffn_down_exps.weight"] == (256, 7168, 2048)
    assert "blk.2.ffn_gate.weight" in shapes
    assert "blk.3.ffn_gate_exps.weight" in shapes
    assert "blk.61.attn_norm.weight" not in shapes


def test_tied_and_untied(tmp_path: Path) -> None:
    found = checked(tmp_path, changed(tiny_model(), {}, {"output.weight": None}))
    assert "output.weight" not in found


def test_all_missing_in_one_message(tmp_path: Path) -> None:
    names = ("blk.0.attn_norm.weight", "blk.1.ffn_up_exps.weight", "output_norm.weight")
    message = refusal(tmp_path, changed(tiny_model(), {}, dict.fromkeys(names)))
    assert "missing 3: " in message
    for name in names:
        assert name in message
    assert "blk.1.ffn_up_exps.weight [8, 32, 32]" in message


@pytest.mark.parametrize("layout", ["split", "legacy"])
def test_missing_latent_projections(tmp_path: Path, layout: str) -> None:
    names = [name for name in tiny_model(layout).tensors if "_b.weight" in str(name)]
    message = refusal(tmp_path, changed(tiny_model(layout), {}, dict.fromkeys(map(str, names))))
    for name in names:
        assert str(name) in message


def test_long_lists_are_folded_but_complete(tmp_path: Path) -> None:
    file = tiny_model(n_layer=50)
    names = {f"blk.{layer}.attn_norm.weight": None for layer in (0, *range(5, 48), 49)}
    message = refusal(tmp_path, changed(file, {}, names | {"output_norm.weight": None}))
    assert "missing 46: blk.{0,5-47,49}.attn_norm.weight [32], output_norm.weight [32]" in message


def test_all_problems_in_one_message(tmp_path: Path) -> None:
    message = refusal(
        tmp_path,
        changed(
            tiny_model(),
            {},
            {
                "blk.0.attn_norm.weight": None,
                "blk.0.attn_output.weight": Tensor((64, 32), 8),
                "blk.1.ffn_gate_inp.weight": Tensor((8, 32), 8),
                "blk.1.ffn_norm.weight": Tensor((16,)),
                "blk.0.attn_q.bias": Tensor((72,)),
            },
        ),
    )
    assert "missing 1: blk.0.attn_norm.weight [32]" in message
    assert "blk.0.attn_output.weight has shape [64, 32]; accepted: [32, 64]" in message
    assert "blk.1.ffn_gate_inp.weight is Q8_0; accepted: F32, F16, BF16" in message
    assert "blk.1.ffn_norm.weight has shape [16]; accepted: [32]" in message
    assert "blk.0.attn_q.bias is not implemented and may change the computation" in message


def test_integers_are_no_weights(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_output.weight": Tensor((32, 64), 26)}
    message = refusal(tmp_path, changed(tiny_model(), {}, tensors))
    assert "blk.0.attn_output.weight is I32; accepted: floating-point" in message


@pytest.mark.parametrize("type_id", [0, 1, 30])
def test_norms_of_any_plain_format(tmp_path: Path, type_id: int) -> None:
    tensors = {"blk.0.attn_norm.weight": Tensor((32,), type_id)}
    checked(tmp_path, changed(tiny_model(), {}, tensors))


@pytest.mark.parametrize(
    "name",
    [
        "rope_freqs.weight",
        "output.bias",
        "token_embd_norm.weight",
        "blk.0.attn_q.bias",
        "blk.0.attn_output.scale",
        "blk.0.ffn_up.bias",
        "blk.1.ffn_gate_up_exps.weight",
        "blk.1.ffn_gate_inp_shexp.weight",
        "blk.0.attn_q_norm.weight",
        "blk.0.indexer.k_norm.weight",
        "blk.0.nextn.eh_proj.weight",
        "blk.1.exp_probs_b.weight",
    ],
)
def test_unexpected_tensors_are_refused(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, changed(tiny_model(), {}, {name: Tensor((32,))}))
    assert f"{name} is not implemented and may change the computation" in message


def test_layers_beyond_the_last(tmp_path: Path) -> None:
    file = tiny_model(n_layer=3)
    message = refusal(tmp_path, changed(file, {"block_count": 2}))
    assert "blk.2.attn_norm.weight is in a layer beyond the 2" in message
    nextn = {"blk.2.nextn.eh_proj.weight": Tensor((32, 64), 8)}
    found = checked(tmp_path, changed(file, {"nextn_predict_layers": 1}, nextn))
    assert not any(name.startswith("blk.2.") for name in found)


def test_harmless_tensors(tmp_path: Path) -> None:
    extra = {
        "blk.0.attn_rot_embd.weight": Tensor((2,)),
        "blk.0.attn_kv_b.weight": Tensor((128, 32), 8),
    }
    found = checked(tmp_path, changed(tiny_model(), {}, extra))
    assert not set(extra) & set(found)


def test_heads_and_rows_in_one_dimension(tmp_path: Path) -> None:
    """Early split files store k_b as [head * latent, nope] and v_b as [head * value, latent]."""
    tensors = {
        f"blk.{layer}.attn_{kind}_b.weight": Tensor((64, 32), 8)
        for layer in range(2)
        for kind in "kv"
    }
    for keys in ({}, {"attention.key_length_mla": None, "attention.value_length_mla": None}):
        found = checked(tmp_path, changed(tiny_model(), keys, tensors))
        assert found["blk.1.attn_k_b.weight"].shape == (2, 32, 32)
    bad = {"blk.0.attn_output.weight": Tensor((2, 16, 64), 8)}
    assert "has shape [2, 16, 64]" in refusal(tmp_path, changed(tiny_model(), {}, bad))
