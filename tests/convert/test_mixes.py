"""The choice of formats: tensor by tensor as in published files, and the rules one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
from mla_backend.convert.mixes import MIXES, Mix, MixFacts, fallback, mix_named, tensor_format
from mla_backend.errors import UsageError
from mla_backend.formats import by_name
from mla_backend.gguf import read_gguf

FILES = [
    ("tiny-v2", "BF16"),
    ("tiny-v2", "Q8_0"),
    ("tiny-v2", "Q4_K_M"),
    ("tiny-v2", "Q2_K"),
    ("tiny-v2", "IQ4_XS"),
    ("tiny-v2", "legacy-Q4_K_M"),
    ("tiny-v3", "BF16"),
    ("tiny-v3", "Q4_K_M"),
    ("tiny-v3", "Q3_K_M"),
    ("tiny-v3", "Q6_K"),
]
#: Tensor kinds that the reference file has in another format on purpose.
OVERRIDDEN = {("tiny-v3", "Q6_K"): ("ffn_gate_exps", "attn_q_b")}


@pytest.mark.parametrize(("model", "type"), FILES, ids=lambda value: value)
def test_formats_of_reference_files(fixtures_dir: Path, model: str, type: str) -> None:
    file = read_gguf(fixtures_dir / model / "gguf" / f"{model}-{type}.gguf")
    stated = file.metadata
    mix = mix_named(type.removeprefix("legacy-"))
    assert mix.file_type == stated["general.file_type"]
    facts = MixFacts(
        n_layer=int(stated["deepseek2.block_count"]),  # type: ignore[arg-type]
        n_expert=int(stated["deepseek2.expert_count"]),  # type: ignore[arg-type]
        n_head=int(stated["deepseek2.attention.head_count"]),  # type: ignore[arg-type]
        n_head_kv=int(stated["deepseek2.attention.head_count_kv"]),  # type: ignore[arg-type]
        tied="output.weight" not in file.tensors,
    )
    for name, info in file.tensors.items():
        if not any(kind in name for kind in OVERRIDDEN.get((model, type), ())):
            assert tensor_format(mix, name, info.shape, facts) == info.format, name


V3 = MixFacts(n_layer=61, n_expert=256, n_head=128)
LEGACY = MixFacts(n_layer=61, n_expert=256, n_head=128, n_head_kv=128)


def chosen(type: str, name: str, row: int = 2048, facts: MixFacts = V3) -> str:
    return tensor_format(mix_named(type), name, (64, row), facts)


def layers_with(type: str, name: str, format: str, facts: MixFacts = V3) -> list[int]:
    names = (f"blk.{layer}.{name}.weight" for layer in range(facts.n_layer))
    return [layer for layer, full in enumerate(names) if chosen(type, full, facts=facts) == format]


def test_sensitive_layers() -> None:
    # The first and last eighth of 61 layers, and every third one from layer 9 on.
    sensitive = [*range(7), *range(9, 53, 3), *range(53, 61)]
    assert layers_with("q4_k_m", "ffn_down_exps", "Q6_K") == sensitive
    assert layers_with("q5_k_m", "ffn_down_shexp", "Q6_K") == sensitive
    assert layers_with("q4_k_m", "attn_kv_b", "Q6_K", LEGACY) == sensitive
    assert layers_with("q5_k_s", "ffn_down", "Q6_K") == []


@pytest.mark.parametrize(
    ("type", "name", "format", "layers"),
    [
        ("q3_k_m", "ffn_down", "Q5_K", range(3)),
        ("q3_k_m", "ffn_down", "Q4_K", range(3, 61)),
        ("q3_k_m", "attn_kv_b", "Q5_K", range(2)),
        ("q3_k_m", "attn_output", "Q4_K", range(61)),
        ("q3_k_l", "ffn_down", "Q5_K", range(61)),
        ("q3_k_s", "ffn_down", "Q3_K", range(61)),
        ("q4_k_s", "ffn_down", "Q5_K", range(7)),
        ("q4_k_s", "attn_kv_b", "Q5_K", range(4)),
        ("q2_k", "ffn_down", "Q3_K", range(61)),
        ("q2_k", "attn_output", "Q3_K", range(61)),
        ("q2_k", "ffn_up", "Q2_K", range(61)),
        ("iq4_xs", "ffn_down", "Q5_K", range(7)),
        ("iq4_nl", "ffn_down", "Q5_K", range(7)),
        ("q4_0", "ffn_down", "Q4_0", range(61)),
    ],
)
def test_rules(type: str, name: str, format: str, layers: range) -> None:
    assert layers_with(type, name, format, LEGACY) == list(layers)


def test_importance_changes_the_first_down_projections() -> None:
    facts = MixFacts(n_layer=16, n_expert=4, has_importance=True)
    assert layers_with("q4_0", "ffn_down", "Q4_1", facts) == [0, 1]
    assert layers_with("q5_0", "ffn_down", "Q5_1", facts) == [0, 1]
    assert layers_with("iq4_xs", "ffn_down", "Q5_K", facts) == []


def test_eight_experts() -> None:
    facts = MixFacts(n_layer=8, n_expert=8, n_head=8, n_head_kv=8)
    assert chosen("q4_k_m", "blk.1.attn_output.weight", facts=facts) == "Q5_K"
    assert chosen("q5_k_m", "blk.1.attn_output.weight", facts=facts) == "Q5_K"
    assert chosen("q3_k_l", "blk.1.attn_output.weight", facts=facts) == "Q3_K"
    assert chosen("q4_k_m", "blk.1.attn_kv_b.weight", facts=facts) == "Q8_0"


def test_shared_keys_and_values_are_precious() -> None:
    facts = MixFacts(n_layer=8, n_head=16, n_head_kv=1)
    assert chosen("q2_k", "blk.1.attn_kv_b.weight", facts=facts) == "Q4_K"
    assert chosen("q2_k", "blk.1.attn_kv_b.weight", facts=LEGACY) == "Q3_K"
    assert chosen("iq4_xs", "blk.1.attn_kv_b.weight", facts=facts) == "Q5_K"


def test_output_and_tied_embedding() -> None:
    tied = MixFacts(n_layer=8, tied=True)
    assert chosen("q4_k_m", "output.weight") == "Q6_K"
    assert chosen("q8_0", "output.weight") == "Q8_0"
    assert chosen("q4_k_m", "token_embd.weight") == "Q4_K"
    assert chosen("q4_k_m", "token_embd.weight", facts=tied) == "Q6_K"
    assert chosen("q4_k_m", "output.weight", row=96) == "Q8_0"


@pytest.mark.parametrize(
    ("wanted", "row", "format"),
    [
        ("Q4_K", 256, "Q4_K"),
        ("Q4_K", 1408, "Q5_0"),
        ("Q5_K", 128, "Q5_1"),
        ("Q6_K", 128, "Q8_0"),
        ("Q2_K", 128, "Q4_0"),
        ("Q3_K", 128, "Q4_0"),
        ("IQ4_XS", 128, "IQ4_NL"),
        ("Q4_K", 100, "F16"),
        ("Q8_0", 100, "F16"),
    ],
)
def test_fallbacks(wanted: str, row: int, format: str) -> None:
    assert fallback(wanted, row) == format


@pytest.mark.parametrize("type", MIXES)
def test_plain_tensors_stay_plain(type: str) -> None:
    mix: Mix = mix_named(type.upper())
    for name, shape in (
        ("output_norm.weight", (256,)),
        ("blk.1.ffn_gate_inp.weight", (4, 256)),
        ("blk.1.exp_probs_b.bias", (4,)),
        ("blk.1.nextn.enorm.weight", (256,)),
    ):
        assert tensor_format(mix, name, shape, V3) == "F32"
    assert by_name(tensor_format(mix, "blk.1.attn_k_b.weight", (2, 512, 128), V3))


def test_names() -> None:
    assert mix_named("Q4_K") is MIXES["q4_k_m"]
    with pytest.raises(UsageError, match=r"'q4_k_x'.*q4_k_m"):
        mix_named("q4_k_x")
