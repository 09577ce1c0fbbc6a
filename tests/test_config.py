"""ModelConfig: values, defaults of older files, and every refusal by name."""

from __future__ import annotations

import math
import os
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from mla_backend.config import ModelConfig, config_from_gguf
from mla_backend.errors import ModelError
from mla_backend.gguf import GGUFFile, read_gguf

from tests.gguf.build import ARRAY, F32, File, Tensor, Typed, build, changed, tiny_model

FIXTURES = Path(os.environ.get("MLA_FIXTURES", ""))
needs_fixtures = pytest.mark.skipif(not os.environ.get("MLA_FIXTURES"), reason="MLA_FIXTURES unset")


def load(folder: Path, file: File) -> GGUFFile:
    path = folder / "model.gguf"
    path.write_bytes(build(file))
    return read_gguf(path)


def config(folder: Path, file: File, **metadata: Any) -> ModelConfig:
    """The configuration of ``file`` with keys changed; ``__`` stands for a dot."""
    keys = {key.replace("__", "."): item for key, item in metadata.items()}
    return config_from_gguf(load(folder, changed(file, keys)))


def refusal(folder: Path, file: File, **metadata: Any) -> str:
    with pytest.raises(ModelError) as caught:
        config(folder, file, **metadata)
    return str(caught.value)


@needs_fixtures
@pytest.mark.parametrize("name", ["BF16", "IQ4_XS", "Q2_K", "Q4_K_M", "Q8_0", "legacy-Q4_K_M"])
def test_tiny_v2(name: str) -> None:
    found = config_from_gguf(read_gguf(FIXTURES / f"tiny-v2/gguf/tiny-v2-{name}.gguf"))
    assert found.layout == ("legacy" if "legacy" in name else "split")
    assert (found.n_layer, found.n_layer_dense, found.n_layer_nextn) == (3, 1, 0)
    assert (found.d_model, found.n_vocab, found.n_head, found.d_ff) == (256, 1024, 4, 160)
    assert (found.d_nope, found.d_rope, found.d_value, found.d_key) == (128, 64, 128, 192)
    assert (found.kv_lora_rank, found.d_cache, found.q_lora_rank) == (256, 320, None)
    assert found.n_ctx_train == 10240
    assert not found.tied_embeddings
    assert found.rms_eps == pytest.approx(1e-6)
    assert (found.rope.scaling, found.rope.factor, found.rope.original_context) == ("yarn", 40, 256)
    assert (found.rope.beta_fast, found.rope.beta_slow) == (32, 1)
    mscale = 0.1 * 0.707 * math.log(40) + 1
    assert found.softmax_scale == pytest.approx(mscale**2 / math.sqrt(192), rel=1e-6)
    moe = found.moe
    assert moe is not None
    assert (moe.n_expert, moe.n_expert_used, moe.n_expert_shared, moe.d_ff) == (6, 3, 2, 96)
    assert (moe.gating, moe.has_bias, moe.weights_norm, moe.weights_scale) == (
        "softmax",
        False,
        False,
        1.0,
    )
    assert (moe.n_group, moe.n_group_used) == (1, 1)


@needs_fixtures
@pytest.mark.parametrize("name", ["BF16", "Q3_K_M", "Q4_K_M", "Q6_K"])
def test_tiny_v3(name: str) -> None:
    found = config_from_gguf(read_gguf(FIXTURES / f"tiny-v3/gguf/tiny-v3-{name}.gguf"))
    assert (found.layout, found.n_head, found.q_lora_rank) == ("split", 2, 256)
    mscale = 0.1 * math.log(40) + 1
    assert found.softmax_scale == pytest.approx(mscale**2 / math.sqrt(192), rel=1e-6)
    moe = found.moe
    assert moe is not None
    assert (moe.n_expert, moe.n_expert_used, moe.n_expert_shared, moe.d_ff) == (16, 4, 1, 64)
    assert (moe.gating, moe.has_bias, moe.weights_norm, moe.weights_scale) == (
        "sigmoid",
        True,
        True,
        2.5,
    )
    assert (moe.n_group, moe.n_group_used, moe.group_score) == (4, 2, "top2_sum")


def test_is_frozen(tmp_path: Path) -> None:
    found = config(tmp_path, tiny_model())
    with pytest.raises(FrozenInstanceError):
        found.n_layer = 3  # type: ignore[misc]


# Older and unusual files --------------------------------------------------------------------------


def test_layouts_agree(tmp_path: Path) -> None:
    split, legacy = config(tmp_path, tiny_model()), config(tmp_path, tiny_model("legacy"))
    assert (split.layout, legacy.layout) == ("split", "legacy")
    for name in ("d_nope", "d_rope", "d_value", "kv_lora_rank", "softmax_scale"):
        assert getattr(split, name) == getattr(legacy, name)


def test_split_keys_mean_the_latent(tmp_path: Path) -> None:
    found = config(tmp_path, tiny_model(), attention__key_length=36, attention__value_length=32)
    assert (found.d_nope, found.d_value) == (32, 32)
    # With a latent of another width than the values, only the *_mla keys fit.
    keys = {"attention__key_length": 1000, "attention__value_length": 900}
    found = config(tmp_path, tiny_model(), **keys)
    assert (found.d_nope, found.d_value) == (32, 32)


def test_split_tensors_without_mla_keys(tmp_path: Path) -> None:
    keys = {"attention__key_length_mla": None, "attention__value_length_mla": None}
    found = config(tmp_path, tiny_model(), **keys, attention__key_length=1000)
    assert (found.layout, found.d_nope, found.d_value) == ("split", 32, 32)


def test_both_layouts_prefer_split(tmp_path: Path) -> None:
    kv_b = {f"blk.{layer}.attn_kv_b.weight": Tensor((128, 32), 8) for layer in range(2)}
    assert config_from_gguf(load(tmp_path, changed(tiny_model(), {}, kv_b))).layout == "split"


def test_defaults_of_older_files(tmp_path: Path) -> None:
    keys = ("expert_weights_scale", "expert_shared_count", "rope.freq_base", "vocab_size")
    file = changed(tiny_model("legacy"), dict.fromkeys(keys))
    found = config_from_gguf(load(tmp_path, file))
    assert found.moe is not None
    assert found.moe.weights_scale == 1.0
    assert found.moe.weights_norm is False
    assert found.moe.gating == "softmax"
    assert found.moe.n_expert_shared == 0
    assert found.rope.freq_base == 10000.0
    assert (found.rope.beta_fast, found.rope.beta_slow) == (32.0, 1.0)
    assert found.n_vocab == 24
    assert found.q_lora_rank is None


def test_zero_means_default(tmp_path: Path) -> None:
    keys = {"expert_weights_scale": 0.0, "expert_gating_func": 0, "attention__q_lora_rank": 0}
    found = config(tmp_path, tiny_model(), **keys, expert_group_count=0, expert_group_used_count=0)
    assert found.moe is not None
    assert (found.moe.weights_scale, found.moe.gating) == (1.0, "softmax")
    assert (found.moe.n_group, found.moe.n_group_used) == (1, 1)
    assert found.q_lora_rank is None


def test_groups_of_softmax_models_count_their_best(tmp_path: Path) -> None:
    found = config(tmp_path, tiny_model(), expert_group_count=4, expert_group_used_count=2)
    assert found.moe is not None
    assert (found.moe.n_group, found.moe.n_group_used, found.moe.group_score) == (4, 2, "max")


def test_bias_without_gating_key_is_sigmoid(tmp_path: Path) -> None:
    found = config(tmp_path, tiny_model(sigmoid=True), expert_gating_func=None)
    assert found.moe is not None
    assert (found.moe.gating, found.moe.has_bias) == ("sigmoid", True)


def test_dense_model(tmp_path: Path) -> None:
    file = tiny_model(n_layer=1)
    for keys in (
        {"expert_count": None, "expert_used_count": None, "leading_dense_block_count": None},
        {"expert_count": 0, "leading_dense_block_count": 1},
        {"expert_count": 8, "leading_dense_block_count": 1},
    ):
        found = config(tmp_path, file, **keys)
        assert (found.n_layer_dense, found.moe) == (1, None)


def test_no_dense_layers(tmp_path: Path) -> None:
    file = changed(tiny_model(), {"feed_forward_length": None, "leading_dense_block_count": None})
    found = config_from_gguf(load(tmp_path, file))
    assert (found.n_layer_dense, found.d_ff) == (0, 0)


def test_tied_embeddings(tmp_path: Path) -> None:
    file = changed(tiny_model(), {}, {"output.weight": None})
    assert config_from_gguf(load(tmp_path, file)).tied_embeddings


def test_prediction_layers_are_not_computed(tmp_path: Path) -> None:
    file = tiny_model(n_layer=3)
    marked = changed(
        file, {"nextn_predict_layers": 1}, {"blk.2.nextn.eh_proj.weight": Tensor((32, 64), 8)}
    )
    found = config_from_gguf(load(tmp_path, marked))
    assert (found.n_layer, found.n_layer_nextn) == (2, 1)
    absent = changed(file, {"nextn_predict_layers": 1, "block_count": 4})
    found = config_from_gguf(load(tmp_path, absent))
    assert (found.n_layer, found.n_layer_nextn) == (3, 1)
    message = refusal(tmp_path, file, nextn_predict_layers=1)
    assert "nextn_predict_layers: found 1, but layer 2 is an ordinary one" in message
    assert "nextn_predict_layers" in refusal(tmp_path, file, nextn_predict_layers=3)


def test_values_per_layer(tmp_path: Path) -> None:
    assert config(tmp_path, tiny_model(), feed_forward_length=[64, 64]).d_ff == 64
    message = refusal(tmp_path, tiny_model(), feed_forward_length=[64, 32])
    assert "deepseek2.feed_forward_length: found [64, 32]; accepted: an integer" in message


@pytest.mark.parametrize(
    ("keys", "scaling", "factor"),
    [
        ({"rope__scaling__type": "linear"}, "linear", 4.0),
        ({"rope__scaling__type": None}, "linear", 4.0),
        ({"rope__scaling__type": "none"}, "none", 1.0),
        ({"rope__scaling__type": None, "rope__scaling__factor": None}, "none", 1.0),
        ({"rope__scaling__factor": 1.0}, "none", 1.0),
        ({}, "yarn", 4.0),
    ],
)
def test_rope_scaling(tmp_path: Path, keys: dict[str, Any], scaling: str, factor: float) -> None:
    found = config(tmp_path, tiny_model(), **keys)
    assert (found.rope.scaling, found.rope.factor) == (scaling, factor)
    mscale = 1 + 0.1 * math.log(factor)
    assert found.softmax_scale == pytest.approx(mscale**2 / math.sqrt(36), rel=1e-6)


def test_yarn_defaults_to_the_trained_context(tmp_path: Path) -> None:
    found = config(tmp_path, tiny_model(), rope__scaling__original_context_length=None)
    assert found.rope.original_context == 512


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shown"), [("llama", "'llama'"), (None, "no such key"), (7, "7")])
def test_other_architecture(tmp_path: Path, name: object, shown: str) -> None:
    message = refusal(tmp_path, changed(tiny_model(), {"general.architecture": name}))
    assert f"general.architecture: found {shown}; accepted: 'deepseek2'" in message
    assert str(tmp_path) in message


def test_adapter(tmp_path: Path) -> None:
    message = refusal(tmp_path, changed(tiny_model(), {"general.type": "adapter"}))
    assert "general.type: found 'adapter'; accepted: 'model'" in message


@pytest.mark.parametrize(
    ("key", "item"),
    [
        ("attention.temperature_scale", 0.1),
        ("attention.temperature_length", 8192),
        ("attention.indexer.head_count", 64),
        ("attention.indexer.top_k", 2048),
        ("attention.sliding_window", 4096),
        ("attention.sliding_window_pattern", [1, 0]),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.scale", 0.5),
        ("attention.output_scale", 0.5),
        ("attention.causal", False),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("router_logit_softcapping", 30.0),
        ("logit_scale", 0.5),
        ("residual_scale", 0.22),
        ("embedding_scale", 12.0),
        ("swiglu_clamp_exp", Typed(ARRAY, [7.0, 7.0], F32)),
        ("swiglu_clamp_shexp", 7.0),
        ("moe_every_n_layers", 2),
        ("interleave_moe_layer_step", 2),
        ("expert_group_scale", 0.05),
        ("hyper_connection.count", 4),
        ("rope.scale_linear", 4.0),
        ("rope.scaling.alpha", 1000.0),
        ("rope.scaling.yarn_ext_factor", 0.5),
        ("rope.scaling.yarn_attn_factor", 1.2),
        ("rope.dimension_sections", [16, 24, 24, 0]),
        ("some.later_invention", True),
    ],
)
def test_keys_that_are_not_implemented(tmp_path: Path, key: str, item: object) -> None:
    message = refusal(tmp_path, changed(tiny_model(), {key: item}))
    assert f"deepseek2.{key} = " in message
    assert "not implemented" in message


@pytest.mark.parametrize(
    ("key", "item"),
    [
        ("attention.temperature_scale", 0.0),
        ("attention.causal", True),
        ("logit_scale", 1.0),
        ("residual_scale", 0.0),
        ("moe_every_n_layers", 1),
        ("rope.scaling.finetuned", True),
        ("rope.scaling.yarn_ext_factor", -1.0),
        ("rope.scaling.attn_factor", 1.0),
        ("swiglu_clamp_exp", Typed(ARRAY, [0.0, 0.0], F32)),
        ("some.later_invention", False),
        ("some.later_array", Typed(ARRAY, [], F32)),
    ],
)
def test_keys_that_change_nothing(tmp_path: Path, key: str, item: object) -> None:
    config_from_gguf(load(tmp_path, changed(tiny_model(), {key: item})))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope__scaling__type": "longrope"}, "rope.scaling.type: found 'longrope'"),
        ({"rope__scaling__factor": None}, "rope.scaling.factor: missing"),
        ({"rope__scaling__factor": 0.5}, "rope.scaling.factor: found 0.5; accepted: 1 or more"),
        ({"rope__scaling__factor": math.nan}, "rope.scaling.factor: found nan"),
        ({"rope__dimension_count": 5}, "rope.dimension_count: found 5; accepted: an even number"),
        ({"rope__dimension_count": 36}, "attention key length: found 36; accepted: more than"),
        ({"rope__freq_base": 1.0}, "rope.freq_base: found 1.0"),
        ({"rope__scaling__yarn_beta_slow": 33.0}, "yarn_beta_fast: found 32.0; accepted: at least"),
        ({"attention__layer_norm_rms_epsilon": 0.0}, "rms_epsilon: found 0.0; accepted: a number"),
        ({"attention__layer_norm_rms_epsilon": math.inf}, "rms_epsilon: found inf"),
        ({"attention__layer_norm_rms_epsilon": "x"}, "rms_epsilon: found 'x'"),
        ({"attention__head_count": 0}, "attention.head_count: found 0; accepted: an integer from"),
        ({"attention__head_count": True}, "attention.head_count: found True"),
        ({"attention__head_count_kv": 3}, "head_count_kv: found 3; accepted: 1 or 2"),
        ({"attention__kv_lora_rank": None}, "deepseek2.attention.kv_lora_rank: missing"),
        ({"block_count": 2**32 - 1}, "block_count: found 4294967295; accepted: an integer from 1"),
        ({"leading_dense_block_count": 3}, "leading_dense_block_count: found 3; accepted: at most"),
        ({"expert_used_count": 9}, "expert_used_count: found 9; accepted: an integer from 1 to 8"),
        ({"expert_gating_func": 3}, "expert_gating_func: found 3; accepted: 1 (softmax)"),
        ({"expert_weights_norm": 1}, "expert_weights_norm: found 1; accepted: true or false"),
        ({"expert_group_count": 3}, "expert groups: found 8 experts in 3 groups"),
        ({"expert_group_count": 4, "expert_group_used_count": 5}, "2 used out of 5 groups"),
        ({"expert_group_count": 8, "expert_group_used_count": 1}, "2 used out of 1 groups"),
        ({"expert_shared_feed_forward_length": 48}, "found 48; accepted: 32, the shared experts"),
        ({"vocab_size": 25}, "vocab_size: found 25; accepted: 24, the rows of token_embd"),
    ],
)
def test_implausible_values(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    assert message in refusal(tmp_path, tiny_model(), **keys)


def test_sum_of_two_best_needs_groups_of_two(tmp_path: Path) -> None:
    file = tiny_model(sigmoid=True)
    keys = {"expert_group_count": 8, "expert_group_used_count": 4}
    assert "found 8 experts in 8 groups" in refusal(tmp_path, file, **keys)


def test_attn_factor_belongs_to_yarn(tmp_path: Path) -> None:
    keys = {"rope__scaling__attn_factor": 1.25}
    assert config(tmp_path, tiny_model(), **keys).rope.attn_factor == 1.25
    message = refusal(tmp_path, tiny_model(), **keys, rope__scaling__type="linear")
    assert "rope.scaling.attn_factor: found 1.25; accepted: 1, unless the type is" in message


def test_all_problems_in_one_message(tmp_path: Path) -> None:
    keys = ("block_count", "context_length", "embedding_length", "attention.head_count")
    file = changed(tiny_model(), dict.fromkeys(keys) | {"logit_scale": 2.0, "expert_used_count": 9})
    message = refusal(tmp_path, file)
    for key in keys:
        assert f"deepseek2.{key}: missing" in message
    assert "deepseek2.logit_scale = 2.0: not implemented: scaled logits" in message
    assert "expert_used_count: found 9" in message
