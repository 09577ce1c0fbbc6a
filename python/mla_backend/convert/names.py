"""Which tensors a GGUF file of a model has, and which of the checkpoint each is made of.

Two changes of form: the experts of a layer are stacked into one tensor, and the joint expansion of
the latent, kv_b [H*(N+V), C], is split by head into k_b [H, C, N], transposed, and v_b [H, V, C].
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from ..config import Layout
from .hf_config import HfConfig

#: How a tensor is made: rows as they are, experts one after another, or a half of kv_b.
Transform = Literal["rows", "stack", "k_b", "v_b"]


@dataclass(frozen=True)
class Target:
    """One tensor of the GGUF file.

    Attributes:
        name: its GGUF name.
        shape: outermost first.
        sources: names in the checkpoint; of experts, in their order.
        source_shape: the shape of each source.
        transform: how it is made of them.
        required: a checkpoint without the source is incomplete.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_shape: tuple[int, ...]
    transform: Transform = "rows"
    required: bool = True


#: Tensors that checkpoints have and files need not: they follow from the configuration.
_DERIVED: Final = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.")


def declare(config: HfConfig, layout: Layout, n_nextn: int) -> list[Target]:
    """All tensors of the file in its order; ``n_nextn`` prediction layers come last."""
    table = (config.n_vocab, config.d_model)
    targets = [_one(config, "token_embd.weight", "model.embed_tokens.weight", table)]
    for layer in range(config.n_layer + n_nextn):
        targets += _layer(config, layer, layout)
    targets.append(_one(config, "output_norm.weight", "model.norm.weight", (config.d_model,)))
    if not config.tied_embeddings:
        targets.append(_one(config, "output.weight", "lm_head.weight", table))
    return targets


def is_left_out(config: HfConfig, name: str, n_nextn: int) -> bool:
    """Whether a tensor of the checkpoint has no place in the file, for a known reason.

    These are buffers that follow from the configuration, the output projection where it is tied,
    prediction layers that are not wanted, and the parts of other modalities.
    """
    if not name.startswith(config.prefix):
        return True
    name = name.removeprefix(config.prefix)
    match = _LAYER.match(name)
    beyond = match is not None and int(match[1]) >= config.n_layer + n_nextn
    tied = config.tied_embeddings and name == "lm_head.weight"
    return beyond or tied or _DERIVED.fullmatch(name) is not None


def has_layer(config: HfConfig, names: set[str], layer: int) -> bool:
    """Whether the checkpoint has any tensor of a layer."""
    prefix = f"{config.prefix}model.layers.{layer}."
    return any(name.startswith(prefix) for name in names)


def _one(
    config: HfConfig,
    name: str,
    source: str,
    shape: tuple[int, ...],
    *,
    required: bool = True,
) -> Target:
    return Target(name, shape, (config.prefix + source,), shape, required=required)


def _layer(config: HfConfig, layer: int, layout: Layout) -> Iterator[Target]:
    d, name, source = config.d_model, f"blk.{layer}.", f"model.layers.{layer}."

    def one(own: str, theirs: str, *shape: int, required: bool = True) -> Target:
        return _one(config, name + own, source + theirs, shape, required=required)

    yield one("attn_norm.weight", "input_layernorm.weight", d)
    yield from _attention(config, layer, layout)
    yield one("ffn_norm.weight", "post_attention_layernorm.weight", d)
    if layer < config.n_layer_dense or config.moe is None:
        yield one("ffn_gate.weight", "mlp.gate_proj.weight", config.d_ff, d)
        yield one("ffn_up.weight", "mlp.up_proj.weight", config.d_ff, d)
        yield one("ffn_down.weight", "mlp.down_proj.weight", d, config.d_ff)
    else:
        yield from _experts(config, layer)
    if layer >= config.n_layer:
        yield one("nextn.eh_proj.weight", "eh_proj.weight", d, 2 * d)
        yield one("nextn.enorm.weight", "enorm.weight", d)
        yield one("nextn.hnorm.weight", "hnorm.weight", d)
        # Some checkpoints leave out what equals the model's own tables.
        table = (config.n_vocab, d)
        yield one("nextn.embed_tokens.weight", "embed_tokens.weight", *table, required=False)
        yield one(
            "nextn.shared_head_head.weight", "shared_head.head.weight", *table, required=False
        )
        yield one("nextn.shared_head_norm.weight", "shared_head.norm.weight", d, required=False)


def _attention(config: HfConfig, layer: int, layout: Layout) -> Iterator[Target]:
    name, source = f"blk.{layer}.attn_", f"model.layers.{layer}.self_attn."
    d, n_head, latent, rank = (
        config.d_model,
        config.n_head,
        config.kv_lora_rank,
        config.q_lora_rank,
    )

    def one(own: str, theirs: str, *shape: int) -> Target:
        return _one(config, f"{name}{own}.weight", f"{source}{theirs}.weight", shape)

    if rank is None:
        yield one("q", "q_proj", n_head * config.d_key, d)
    else:
        yield one("q_a", "q_a_proj", rank, d)
        yield one("q_a_norm", "q_a_layernorm", rank)
        yield one("q_b", "q_b_proj", n_head * config.d_key, rank)
    yield one("kv_a_mqa", "kv_a_proj_with_mqa", latent + config.d_rope, d)
    yield one("kv_a_norm", "kv_a_layernorm", latent)
    nope, value = config.d_nope, config.d_value
    joint = (n_head * (nope + value), latent)
    if layout == "legacy":
        yield one("kv_b", "kv_b_proj", *joint)
    else:
        sources = (f"{config.prefix}{source}kv_b_proj.weight",)
        yield Target(f"{name}k_b.weight", (n_head, latent, nope), sources, joint, "k_b")
        yield Target(f"{name}v_b.weight", (n_head, value, latent), sources, joint, "v_b")
    yield one("output", "o_proj", d, n_head * value)


def _experts(config: HfConfig, layer: int) -> Iterator[Target]:
    moe, d = config.moe, config.d_model
    assert moe is not None, "only layers with experts come here"
    name, source = f"blk.{layer}.", f"model.layers.{layer}.mlp."

    def one(own: str, theirs: str, *shape: int) -> Target:
        return _one(config, name + own, source + theirs, shape)

    yield one("ffn_gate_inp.weight", "gate.weight", moe.n_expert, d)
    if moe.has_bias:
        yield one("exp_probs_b.bias", "gate.e_score_correction_bias", moe.n_expert)
    for kind, shape in (("gate", (moe.d_ff, d)), ("up", (moe.d_ff, d)), ("down", (d, moe.d_ff))):
        sources = tuple(
            f"{config.prefix}{source}experts.{expert}.{kind}_proj.weight"
            for expert in range(moe.n_expert)
        )
        stacked = (moe.n_expert, *shape)
        yield Target(f"{name}ffn_{kind}_exps.weight", stacked, sources, shape, "stack")
    if moe.n_expert_shared:
        width = moe.n_expert_shared * moe.d_ff
        yield one("ffn_gate_shexp.weight", "shared_experts.gate_proj.weight", width, d)
        yield one("ffn_up_shexp.weight", "shared_experts.up_proj.weight", width, d)
        yield one("ffn_down_shexp.weight", "shared_experts.down_proj.weight", d, width)
