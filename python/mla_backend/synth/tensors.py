"""The tensors of a model: names, shapes, and the spread of their random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..config import Layout
from ..convert.mixes import Mix, MixFacts, tensor_format
from .shapes import ModelShape

#: Deviation of the logits: as in trained models, a few tokens stand out and most do not.
_LOGIT_STD = 2.5
#: Deviation of the selection bias: it tips near ties between experts and starves none.
_BIAS_STD = 0.05


@dataclass(frozen=True)
class Plan:
    """One tensor: shape outermost first, and normal numbers around ``mean`` to fill it with."""

    name: str
    format: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


def plan_tensors(shape: ModelShape, mix: Mix, layout: Layout) -> list[Plan]:
    """All tensors in file order.

    Deviations are 1/sqrt(terms summed), so that activations keep their size from layer to layer.
    """
    plans = list(_global_tensors(shape))
    for layer in range(shape.n_layer):
        block = [*_attention(shape, layout), *_feed_forward(shape, layer)]
        plans += [
            replace(plan, name=f"blk.{layer}.{plan.name}")
            for plan in sorted(block, key=lambda plan: plan.name)
        ]
    facts = MixFacts(
        n_layer=shape.n_layer,
        n_expert=shape.n_expert,
        n_head=shape.n_head,
        n_head_kv=shape.n_head if layout == "legacy" else 1,
        tied=shape.tied,
    )
    return [
        replace(plan, format=tensor_format(mix, plan.name, plan.shape, facts)) for plan in plans
    ]


def _matrix(name: str, *shape: int, fan_in: int | None = None) -> Plan:
    """Rows of ``shape[-1]`` weights; ``fan_in`` where the sum runs over another dimension."""
    return Plan(f"{name}.weight", "", shape, 1 / math.sqrt(fan_in or shape[-1]))


def _norm(name: str, width: int) -> Plan:
    return Plan(f"{name}.weight", "", (width,), 0.1, mean=1.0)


def _global_tensors(s: ModelShape) -> Iterator[Plan]:
    output_std = _LOGIT_STD / math.sqrt(s.d_model)
    if not s.tied:
        yield Plan("output.weight", "", (s.vocab, s.d_model), output_std)
    yield _norm("output_norm", s.d_model)
    embed_std = output_std if s.tied else 1.0
    yield Plan("token_embd.weight", "", (s.vocab, s.d_model), embed_std)


def _attention(s: ModelShape, layout: Layout) -> Iterator[Plan]:
    yield _norm("attn_norm", s.d_model)
    n_query = s.n_head * (s.nope + s.rope)
    if s.q_lora_rank is None:
        yield _matrix("attn_q", n_query, s.d_model)
    else:
        yield _matrix("attn_q_a", s.q_lora_rank, s.d_model)
        yield _norm("attn_q_a_norm", s.q_lora_rank)
        yield _matrix("attn_q_b", n_query, s.q_lora_rank)
    yield _matrix("attn_kv_a_mqa", s.kv_lora_rank + s.rope, s.d_model)
    yield _norm("attn_kv_a_norm", s.kv_lora_rank)
    if layout == "legacy":
        yield _matrix("attn_kv_b", s.n_head * (s.nope + s.value), s.kv_lora_rank)
    else:
        yield from split_kv_b(s)
    yield _matrix("attn_output", s.d_model, s.n_head * s.value)


def split_kv_b(s: ModelShape) -> tuple[Plan, Plan]:
    """The key and value expansions of one layer: [H, C, N], transposed per head, and [H, V, C]."""
    return (
        _matrix("attn_k_b", s.n_head, s.kv_lora_rank, s.nope, fan_in=s.kv_lora_rank),
        _matrix("attn_v_b", s.n_head, s.value, s.kv_lora_rank),
    )


def _feed_forward(s: ModelShape, layer: int) -> Iterator[Plan]:
    yield _norm("ffn_norm", s.d_model)
    if not s.is_moe(layer):
        yield from _gated("", s.d_model, s.d_ff)
        return
    # The router decides on near ties, so files keep it in F32.
    yield Plan("ffn_gate_inp.weight", "F32", (s.n_expert, s.d_model), 1 / math.sqrt(s.d_model))
    if s.gating == "sigmoid":
        yield Plan("exp_probs_b.bias", "F32", (s.n_expert,), _BIAS_STD)
    yield from _gated("_exps", s.d_model, s.d_ff_expert, s.n_expert)
    if s.n_expert_shared:
        yield from _gated("_shexp", s.d_model, s.n_expert_shared * s.d_ff_expert)


def _gated(suffix: str, d_model: int, d_inner: int, *leading: int) -> Iterator[Plan]:
    yield _matrix(f"ffn_gate{suffix}", *leading, d_inner, d_model)
    yield _matrix(f"ffn_up{suffix}", *leading, d_inner, d_model)
    yield _matrix(f"ffn_down{suffix}", *leading, d_model, d_inner)
