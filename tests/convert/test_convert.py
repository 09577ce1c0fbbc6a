"""Checkpoints become files: names, transforms, types, metadata, splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from convert.checkpoints import (
    DENSE,
    DENSE_CONFIG,
    EXPERTS,
    HEADS,
    LATENT,
    LAYERS,
    NOPE,
    ROPE,
    V2_CONFIG,
    V3_CONFIG,
    VALUE,
    VOCAB,
    Checkpoint,
    D,
    checkpoint,
    expected,
    numbers,
)
from convert.files import floats, keys, raw
from mla_backend.convert.from_hf import ConvertOptions, convert, plan_conversion
from mla_backend.errors import ModelError, UsageError
from mla_backend.gguf import read_gguf

PLAIN = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "blk.1.attn_q_a.weight": "model.layers.1.self_attn.q_a_proj.weight",
    "blk.1.attn_q_a_norm.weight": "model.layers.1.self_attn.q_a_layernorm.weight",
    "blk.1.attn_q_b.weight": "model.layers.1.self_attn.q_b_proj.weight",
    "blk.1.attn_kv_a_mqa.weight": "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    "blk.1.attn_kv_a_norm.weight": "model.layers.1.self_attn.kv_a_layernorm.weight",
    "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
    "blk.1.ffn_gate_inp.weight": "model.layers.1.mlp.gate.weight",
    "blk.1.exp_probs_b.bias": "model.layers.1.mlp.gate.e_score_correction_bias",
    "blk.2.ffn_up_shexp.weight": "model.layers.2.mlp.shared_experts.up_proj.weight",
}


def made(tmp_path: Path, source: Checkpoint, **options: Any) -> Path:
    out = tmp_path / "out.gguf"
    convert(source.write(tmp_path / "hf"), out, ConvertOptions(**options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out.gguf"]
    return out


def check_exact(source: Checkpoint, path: Path, plain: dict[str, str]) -> None:
    found = floats(path)
    for name, origin in plain.items():
        np.testing.assert_array_equal(found[name], numbers(source, origin), err_msg=name)
    for layer in range(LAYERS):
        for name, values in expected(source, layer).items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_are_exact(tmp_path: Path, dtype: Any) -> None:
    source = checkpoint(dtype=dtype)
    path = made(tmp_path, source, outtype="f32")
    check_exact(source, path, PLAIN)
    read_gguf(path)


def test_fp8_is_exact_with_scales_elsewhere_and_partial_blocks(tmp_path: Path) -> None:
    source = checkpoint(fp8=True)
    check_exact(source, made(tmp_path, source, outtype="f32"), PLAIN)


def test_bf16_is_copied_and_plain_tensors_are_f32(tmp_path: Path) -> None:
    source = checkpoint()
    path = made(tmp_path, source)  # auto
    check_exact(source, path, PLAIN)
    formats = {name: info.format for name, info in read_gguf(path).tensors.items()}
    plain = {name for name, format in formats.items() if format == "F32"}
    assert plain == {
        name for name in formats if name.endswith(("norm.weight", ".bias", "ffn_gate_inp.weight"))
    }
    assert {formats[name] for name in formats.keys() - plain} == {"BF16"}


def test_fp8_is_rounded_once(tmp_path: Path) -> None:
    source = checkpoint(fp8=True)
    found = raw(made(tmp_path, source, outtype="bf16"))
    values = expected(source, 1)["blk.1.attn_k_b.weight"].astype(ml_dtypes.bfloat16)
    assert found["blk.1.attn_k_b.weight"][2] == values.tobytes()


@pytest.mark.parametrize("outtype", ["q8_0", "q4_k_m", "q2_k"])
def test_quantized_tensors_are_near(tmp_path: Path, outtype: str) -> None:
    source = checkpoint(fp8=True)
    found = floats(made(tmp_path, source, outtype=outtype, threads=2))
    for name, values in expected(source, 2).items():
        error = np.square(found[name] - values).mean() / np.square(values).mean()
        assert error < (1e-4 if outtype == "q8_0" else 0.02), name


def test_legacy_layout(tmp_path: Path) -> None:
    source = checkpoint()
    path = made(tmp_path, source, layout="legacy", outtype="f32")
    found = floats(path)
    joint = numbers(source, "model.layers.1.self_attn.kv_b_proj.weight")
    np.testing.assert_array_equal(found["blk.1.attn_kv_b.weight"], joint)
    assert not [name for name in found if "attn_k_b" in name or "attn_v_b" in name]
    stated = {key: value for key, (_, value) in keys(path).items()}
    assert stated["deepseek2.attention.head_count_kv"] == HEADS
    assert stated["deepseek2.attention.key_length"] == NOPE + ROPE
    assert stated["deepseek2.attention.value_length"] == VALUE
    assert not [key for key in stated if key.endswith("_mla")]


def test_metadata(tmp_path: Path) -> None:
    stated = {key: value for key, (_, value) in keys(made(tmp_path, checkpoint())).items()}
    model = {key[10:]: value for key, value in stated.items() if key.startswith("deepseek2.")}
    assert model == {
        "block_count": LAYERS,
        "context_length": 4096,
        "embedding_length": D,
        "feed_forward_length": 224,
        "leading_dense_block_count": 1,
        "vocab_size": VOCAB,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.q_lora_rank": 96,
        "attention.kv_lora_rank": LATENT,
        "attention.key_length": LATENT + ROPE,
        "attention.value_length": LATENT,
        "attention.key_length_mla": NOPE + ROPE,
        "attention.value_length_mla": VALUE,
        "expert_count": EXPERTS,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 96,
        "expert_group_count": 2,
        "expert_group_used_count": 1,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "rope.dimension_count": ROPE,
        "rope.freq_base": 50000.0,
    }
    assert stated["general.file_type"] == 32
    assert stated["tokenizer.ggml.pre"] == "deepseek-v3"
    assert stated["tokenizer.ggml.bos_token_id"] == 300
    assert stated["tokenizer.ggml.tokens"][302] == "<think>"
    assert stated["tokenizer.ggml.token_type"][300:304] == [3, 3, 4, 5]
    assert stated["tokenizer.ggml.tokens"][319] == "[PAD319]"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "yarn"}},
        {"rope_scaling": {"rope_type": "yarn", "type": "yarn"}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 50000.0}},
    ],
    ids=["old", "both", "new"],
)
def test_rope_scaling_old_and_new(tmp_path: Path, rope: dict[str, Any]) -> None:
    common = {
        "factor": 40,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
    rope = {k: v | common if isinstance(v, dict) else v for k, v in rope.items()}
    stated = keys(made(tmp_path, checkpoint(V3_CONFIG | rope)))
    found = {key[15:]: value for key, (_, value) in stated.items() if "deepseek2.rope." in key}
    assert found == {
        "dimension_count": ROPE,
        "freq_base": 50000.0,
        "scaling.type": "yarn",
        "scaling.factor": 40.0,
        "scaling.original_context_length": 1024,
        "scaling.yarn_beta_fast": 32.0,
        "scaling.yarn_beta_slow": 1.0,
        "scaling.yarn_log_multiplier": pytest.approx(0.0707),
    }


def test_v2_without_query_latent(tmp_path: Path) -> None:
    source = checkpoint(V2_CONFIG)
    path = made(tmp_path, source, outtype="f32")
    found = floats(path)
    origin = numbers(source, "model.layers.2.self_attn.q_proj.weight")
    np.testing.assert_array_equal(found["blk.2.attn_q.weight"], origin)
    stated = keys(path)
    assert stated["deepseek2.expert_gating_func"][1] == 1
    assert "deepseek2.attention.q_lora_rank" not in stated
    assert "deepseek2.expert_weights_norm" not in stated


def test_dense_and_tied(tmp_path: Path) -> None:
    source = checkpoint(DENSE_CONFIG)
    source.tensors["lm_head.weight"] = source.tensors["model.embed_tokens.weight"]
    path = made(tmp_path, source, outtype="q4_k_m")
    stated = {key: value for key, (_, value) in keys(path).items()}
    assert stated["deepseek2.leading_dense_block_count"] == LAYERS
    assert stated["deepseek2.expert_shared_count"] == 0
    assert "deepseek2.expert_count" not in stated
    tensors = read_gguf(path).tensors
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].format == "Q8_0"  # rows of 192, as an output projection


def test_dense_layers_by_list(tmp_path: Path) -> None:
    source = checkpoint()
    source.config["mlp_layer_types"] = ["dense"] * DENSE + ["sparse"] * (LAYERS - DENSE)
    del source.config["first_k_dense_replace"]
    stated = keys(made(tmp_path, source))
    assert stated["deepseek2.leading_dense_block_count"][1] == DENSE


@pytest.mark.parametrize(
    "architecture", ["KimiVLForConditionalGeneration", "KimiK25ForConditionalGeneration"]
)
def test_language_model_within_another(tmp_path: Path, architecture: str) -> None:
    plain = floats(made(tmp_path / "plain", checkpoint()))
    source = checkpoint()
    source.config = {"architectures": [architecture], "text_config": source.config}
    source.tensors = {f"language_model.{name}": v for name, v in source.tensors.items()}
    source.tensors["vision_tower.patch_embed.proj.weight"] = np.zeros((2, 2), np.float32)
    found = floats(made(tmp_path / "within", source))
    assert found.keys() == plain.keys()
    for name, values in plain.items():
        np.testing.assert_array_equal(found[name], values)


def test_prediction_layer(tmp_path: Path) -> None:
    source = checkpoint(n_nextn=1)
    path = made(tmp_path, source, outtype="f32")
    found, stated = floats(path), keys(path)
    assert stated["deepseek2.block_count"][1] == LAYERS + 1
    assert stated["deepseek2.nextn_predict_layers"][1] == 1
    for name in ("eh_proj", "enorm", "hnorm", "embed_tokens"):
        origin = numbers(source, f"model.layers.{LAYERS}.{name}.weight")
        np.testing.assert_array_equal(found[f"blk.{LAYERS}.nextn.{name}.weight"], origin)
    for name in ("head", "norm"):
        origin = numbers(source, f"model.layers.{LAYERS}.shared_head.{name}.weight")
        np.testing.assert_array_equal(
            found[f"blk.{LAYERS}.nextn.shared_head_{name}.weight"], origin
        )
    np.testing.assert_array_equal(
        found[f"blk.{LAYERS}.attn_k_b.weight"],
        expected(source, LAYERS)[f"blk.{LAYERS}.attn_k_b.weight"],
    )


def test_layers_that_nobody_promised(tmp_path: Path) -> None:
    source = checkpoint(n_nextn=1)
    del source.config["num_nextn_predict_layers"]
    plan = plan_conversion(source.write(tmp_path / "hf"), tmp_path / "o")
    assert plan.n_nextn == 0
    assert plan.notes[0].startswith(f"layers from {LAYERS} on are left out")


@pytest.mark.parametrize("how", ["left out", "lacking"])
def test_without_prediction_layer(tmp_path: Path, how: str) -> None:
    source = checkpoint(n_nextn=1)
    if how == "lacking":
        source.tensors = {k: v for k, v in source.tensors.items() if f"layers.{LAYERS}." not in k}
    hf = source.write(tmp_path / "hf")
    plan = plan_conversion(hf, tmp_path / "o", ConvertOptions(keep_nextn=how == "lacking"))
    assert plan.n_nextn == 0
    assert "prediction layer (MTP)" in plan.notes[0]
    names = [tensor.name for tensor in plan.output.tensors]
    assert not [name for name in names if name.startswith(f"blk.{LAYERS}.")]


def test_split_output_holds_the_same(tmp_path: Path) -> None:
    source = checkpoint()
    whole = made(tmp_path, source)
    parts = tmp_path / "parts"
    parts.mkdir()
    options = ConvertOptions(max_shard_bytes=300_000)
    plan = convert(tmp_path / "hf", parts / "m.gguf", options)
    assert len(plan.output.paths) > 2
    assert sorted(parts.iterdir()) == sorted(plan.output.paths)
    assert plan.output.paths[0].name == f"m-00001-of-{len(plan.output.paths):05d}.gguf"
    for path in plan.output.paths:
        n_bytes = sum(len(data) for _, _, data in raw(path).values())
        assert n_bytes <= 300_000 or len(raw(path)) == 1
    joined: dict[str, Any] = {}
    for path in plan.output.paths:
        joined |= raw(path)
    assert joined == raw(whole)
    assert list(read_gguf(plan.output.paths[1]).tensors) == list(read_gguf(whole).tensors)


def test_threads_do_not_change_bytes(tmp_path: Path) -> None:
    hf = checkpoint(fp8=True).write(tmp_path / "hf")
    files = []
    for threads in (1, 3):
        files.append(tmp_path / f"{threads}.gguf")
        convert(hf, files[-1], ConvertOptions(outtype="q4_k_m", threads=threads))
    assert files[0].read_bytes() == files[1].read_bytes()


def test_one_file_without_an_index(tmp_path: Path) -> None:
    source = checkpoint()
    hf = source.write(tmp_path / "hf", n_shards=1)
    (hf / "model.safetensors.index.json").unlink()
    next(hf.glob("*.safetensors")).rename(hf / "model.safetensors")
    out = tmp_path / "o.gguf"
    convert(hf, out, ConvertOptions(outtype="f32"))
    check_exact(source, out, PLAIN)


def test_numbers_beyond_f16_are_refused_and_nothing_stays(tmp_path: Path) -> None:
    source = checkpoint()
    source.tensors["lm_head.weight"][3, 5] = 1e6
    hf = source.write(tmp_path / "hf")
    with pytest.raises(ModelError, match=r"output\.weight.*BF16"):
        convert(hf, tmp_path / "o.gguf", ConvertOptions(outtype="f16"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_nan_is_refused(tmp_path: Path) -> None:
    source = checkpoint(fp8=True)
    codes = source.tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    codes.view(np.uint8)[1, 7] = 0x7F
    hf = source.write(tmp_path / "hf")
    with pytest.raises(ModelError, match=r"experts\.2\.up_proj.*NaN"):
        convert(hf, tmp_path / "o.gguf", ConvertOptions(outtype="bf16"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'q9'.*q4_k_m"):
        plan_conversion(tmp_path, tmp_path / "o", ConvertOptions(outtype="q9"))
    with pytest.raises(UsageError, match="split size"):
        plan_conversion(tmp_path, tmp_path / "o", ConvertOptions(max_shard_bytes=0))
