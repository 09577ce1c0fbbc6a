"""Checkpoints that cannot be converted: refused before anything is written, with all problems."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert.checkpoints import LAYERS, Checkpoint, checkpoint, write_safetensors
from mla_backend.convert.from_hf import plan_conversion
from mla_backend.convert.safetensors import read_header
from mla_backend.errors import ModelError

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 1024}


def problems(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        plan_conversion(path, path.parent / "o.gguf")
    assert sorted(other.name for other in path.parent.iterdir()) == [path.name]
    return str(caught.value)


def test_all_problems_in_one_message(tmp_path: Path) -> None:
    source = checkpoint(fp8=True)
    tensors = source.tensors
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"]
    del tensors["model.layers.2.self_attn.o_proj.weight_scale_inv"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)
    tensors["model.layers.0.self_attn.q_a_proj.bias"] = np.zeros(96, np.float32)
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    tensors[name] = tensors[name][:1]
    assert source.tokenizer is not None
    source.tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    message = problems(source.write(tmp_path / "hf"))
    for text in (
        "experts.3.up_proj.weight [96, 192]: missing",
        "layers.2.self_attn.o_proj.weight_scale_inv: missing",
        "model.norm.weight: found shape [191]; accepted: [192]",
        "lm_head.weight: found I32; accepted: F32, F16, BF16, F8_E4M3",
        "model.layers.0.self_attn.q_a_proj.bias",
        "mlp.up_proj.weight_scale_inv: found F32 [1, 2]; accepted: F32 [2, 2]",
        "pre_tokenizer: found one that is not known",
    ):
        assert text in message, text


def test_many_like_problems_are_one_line(tmp_path: Path) -> None:
    source = checkpoint(fp8=True)
    for name in list(source.tensors):
        if ".experts." in name and name.endswith(("up_proj.weight", "down_proj.weight_scale_inv")):
            del source.tensors[name]
    lines = problems(source.write(tmp_path / "hf")).splitlines()[1:]
    assert lines == [
        "  model.layers.{1-2}.mlp.experts.{0-3}.up_proj.weight [96, 192]: missing",
        "  model.layers.{1-2}.mlp.experts.{0-3}.down_proj.weight_scale_inv: missing; "
        "fp8 weights mean nothing without their scales",
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM'"),
        ({"architectures": None}, "architectures: found None"),
        ({"hidden_size": None}, "hidden_size: found nothing"),
        ({"kv_lora_rank": "512"}, "kv_lora_rank: found '512'; accepted: an integer"),
        ({"num_attention_heads": -2}, "num_attention_heads: found -2"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: found 2"),
        ({"attention_bias": True}, "attention_bias: found True"),
        ({"rope_interleave": False}, "rope_interleave: found False"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: found 0.5"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types: accepted"),
        ({"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types: accepted"),
        ({"mlp_layer_types": 3}, "mlp_layer_types: accepted"),
        ({"scoring_func": "tanh"}, "scoring_func: found 'tanh'"),
        ({"topk_method": "random"}, "topk_method: found 'random'"),
        ({"n_group": 3}, "n_group: found 3; accepted: a divisor of the 4 experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: found 9"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type: found 'dynamic'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: factor: found nothing"),
        ({"rope_scaling": YARN | {"mscale": 1, "mscale_all_dim": 0.7}}, "mscale: found 1.0"),
        ({"rope_scaling": YARN | {"attention_factor": 0.5}}, "attention_factor: found 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method: found 'gptq'"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}},
            "weight_block_size: found [0, 1]",
        ),
    ],
)
def test_configurations(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    source = checkpoint()
    source.config |= changes
    assert text in problems(source.write(tmp_path / "hf"))


def drop_shard(path: Path) -> None:
    next(path.glob("*-00002-of-*")).unlink()


def cut_shard(path: Path) -> None:
    shard = next(path.glob("*-00002-of-*"))
    shard.write_bytes(shard.read_bytes()[:-100])


def pointer(path: Path) -> None:
    next(path.glob("*-00001-of-*")).write_text("version https://git-lfs.github.com/spec/v1\n")


def promise(path: Path) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.other"] = next(path.glob("*-00001-of-*")).name
    file.write_text(json.dumps(index))


def escape(path: Path) -> None:
    file = path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}))


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def bad_json(path: Path) -> None:
    (path / "config.json").write_text("{")


def no_weights(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"PK")


def no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (drop_shard, "1 of 2 weight files are missing: model-00002-of-000002.safetensors"),
        (cut_shard, "(is the download truncated?)"),
        (pointer, "Git LFS pointer"),
        (promise, "model.other (model-00001-of-000002.safetensors)"),
        (escape, "plain file names"),
        (no_config, "config.json: missing"),
        (bad_json, "config.json: no valid JSON"),
        (no_weights, "PyTorch files are not read"),
        (no_tokenizer, "neither tokenizer.json nor tiktoken.model"),
    ],
)
def test_damaged_directories(tmp_path: Path, damage: Callable[[Path], None], text: str) -> None:
    path = checkpoint().write(tmp_path / "hf")
    damage(path)
    assert text in problems(path)


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found nothing"):
        plan_conversion(tmp_path / "none", tmp_path / "o")


def test_partial_prediction_layer_is_incomplete(tmp_path: Path) -> None:
    source = checkpoint(n_nextn=1)
    del source.tensors[f"model.layers.{LAYERS}.eh_proj.weight"]
    assert f"model.layers.{LAYERS}.eh_proj.weight" in problems(source.write(tmp_path / "hf"))


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    source: Checkpoint = checkpoint()
    assert source.tokenizer is not None
    source.tokenizer["added_tokens"].append({"id": 320, "content": "<x>", "special": True})
    assert "found id 320; accepted: below vocab_size 320" in problems(source.write(tmp_path / "hf"))


# ---- The container -------------------------------------------------------------------------------


def container(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(
    begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32"
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "0 bytes"),
        (b"GGUF", "a GGUF file"),
        (b"PK\x03\x04", "zip"),
        (bytes(64), "zeros"),
        (container({}, length=1 << 60), "header length"),
        (container({}, length=1000), "truncated"),
        (container(b"{"), "no valid JSON"),
        (container(b"[" * 100_000), "no valid JSON"),
        (container([]), "JSON of type list"),
        (container(b'{"a":1,"a":2}'), "'a' more than once"),
        (container({"a": 1}), "'a': found 1"),
        (container({"a": entry(0, 8, dtype="F12")}, bytes(8)), "dtype: found 'F12'"),
        (container({"a": entry(0, 8, shape=[-2])}, bytes(8)), "shape: found [-2]"),
        (container({"a": entry(0, 8, shape=[2.0])}, bytes(8)), "shape: found [2.0]"),
        (container({"a": entry(0, 8, shape=[True])}, bytes(8)), "shape: found [True]"),
        (container({"a": entry(0, 12)}, bytes(12)), "12 bytes; accepted: 8"),
        (container({"a": entry(8, 0)}, bytes(8)), "-8 bytes"),
        (container({"a": entry(0, 8)}, bytes(4)), "truncated"),
        (container({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "an overlap"),
        (container({"a": entry(4, 12)}, bytes(12)), "a gap"),
        (container({"a": entry(0, 8)}, bytes(9)), "1 bytes after the last tensor"),
    ],
)
def test_damaged_containers(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert text in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("first", [b"<", b"{", b"P", b"G", b"v"])
def test_lengths_that_look_like_other_files(tmp_path: Path, first: bytes) -> None:
    path = tmp_path / "m.safetensors"
    header = json.dumps({"a": entry(0, 8)}).encode()
    header += b" " * ((first[0] - len(header)) % 256)
    path.write_bytes(container(header, bytes(8)))
    assert path.read_bytes().startswith(first)
    assert list(read_header(path)) == ["a"]


def test_containers_with_empty_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a": np.zeros((0, 4), np.float32), "b": np.ones(3, np.float32)})
    found = read_header(path)
    assert {name: tensor.shape for name, tensor in found.items()} == {"a": (0, 4), "b": (3,)}
