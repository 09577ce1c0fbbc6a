"""What a checkpoint's config.json says of the model, validated once and frozen.

Configurations were written over years by several programs: keys that a model does not state have
the defaults of the code that it was published for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from ..config import Gating, Scaling
from .fields import Fields


@dataclass(frozen=True)
class HfRope:
    """Rotary embedding: YaRN, linear or none, and what the file says of it.

    Optional values are None where the configuration has none.
    """

    theta: float
    scaling: Scaling = "none"
    factor: float = 1.0
    original_context: int = 0
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class HfMoe:
    """Routed and shared experts; names as in ``mla_backend.config.MoeConfig``."""

    n_expert: int
    n_expert_used: int
    n_expert_shared: int
    d_ff: int
    gating: Gating
    has_bias: bool
    n_group: int
    n_group_used: int
    weights_norm: bool
    weights_scale: float


@dataclass(frozen=True)
class HfConfig:
    """One model. Widths are counts of numbers; names as in ``mla_backend.config.ModelConfig``.

    Attributes:
        prefix: what tensor names begin with before ``model.``.
        n_layer_nextn: prediction layers that the configuration promises.
        fp8_block: rows and columns that share a scale in 8-bit weights.
    """

    prefix: str
    n_layer: int
    n_layer_dense: int
    n_layer_nextn: int
    d_model: int
    n_head: int
    d_nope: int
    d_rope: int
    d_value: int
    kv_lora_rank: int
    q_lora_rank: int | None
    d_ff: int
    n_vocab: int
    n_ctx_train: int
    rms_eps: float
    tied_embeddings: bool
    rope: HfRope
    moe: HfMoe | None
    fp8_block: tuple[int, int]

    @property
    def d_key(self) -> int:
        """Numbers per expanded key and query head: N + R."""
        return self.d_nope + self.d_rope


@dataclass(frozen=True)
class _Family:
    """Architectures that share defaults."""

    gating: Gating
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    first_k_dense_replace: int


_V2: Final = _Family("softmax", "greedy", False, 1.0, 1, 1, 0)
_V3: Final = _Family("sigmoid", "noaux_tc", True, 2.5, 8, 4, 3)
_V3_UNGROUPED: Final = _Family("sigmoid", "noaux_tc", True, 1.0, 1, 1, 1)

#: Architectures of ``config.json`` -> their defaults, and the prefix of their tensor names.
ARCHITECTURES: Final[Mapping[str, tuple[_Family, str]]] = MappingProxyType(
    {
        "DeepseekV2ForCausalLM": (_V2, ""),
        "DeepseekV3ForCausalLM": (_V3, ""),
        "KimiVLForConditionalGeneration": (_V3, "language_model."),
        "KimiK25ForConditionalGeneration": (_V3, "language_model."),
        "Glm4MoeLiteForCausalLM": (_V3_UNGROUPED, ""),
        "YoutuForCausalLM": (_V3_UNGROUPED, ""),
    }
)

# Selection methods: whether groups are chosen first, and whether a bias takes part.
_TOPK_METHODS: Final = {
    "greedy": (False, False),
    "group_limited_greedy": (True, False),
    "noaux_tc": (True, True),
}


def read_config(config: Mapping[str, Any], problems: list[str]) -> HfConfig | None:
    """The model of a ``config.json``; everything wrong with it is added to ``problems``.

    None where it is of another architecture.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        accepted = ", ".join(ARCHITECTURES)
        problems.append(f"config.json: architectures: found {names!r}; accepted: {accepted}")
        return None
    family, prefix = ARCHITECTURES[name]
    text = config.get("text_config")
    fields = Fields({**config, **text} if isinstance(text, Mapping) else config, problems)
    _refuse_variants(fields)
    moe = _read_moe(fields, family)
    n_layer = fields.integer("num_hidden_layers")
    return HfConfig(
        prefix=prefix,
        n_layer=n_layer,
        n_layer_dense=_count_dense(fields, family, moe, n_layer),
        n_layer_nextn=fields.integer("num_nextn_predict_layers", 0, low=0),
        d_model=fields.integer("hidden_size"),
        n_head=fields.integer("num_attention_heads"),
        d_nope=fields.integer("qk_nope_head_dim"),
        d_rope=fields.integer("qk_rope_head_dim"),
        d_value=fields.integer("v_head_dim"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        q_lora_rank=fields.integer("q_lora_rank", 0, low=0) or None,
        d_ff=fields.integer("intermediate_size"),
        n_vocab=fields.integer("vocab_size"),
        n_ctx_train=fields.integer("max_position_embeddings"),
        rms_eps=fields.number("rms_norm_eps", 1e-6),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        rope=_read_rope(fields),
        moe=moe,
        fp8_block=_read_fp8_block(fields),
    )


def _refuse_variants(fields: Fields) -> None:
    """Settings that change the computation and that GGUF files cannot express."""
    fields.expect("hidden_act", ("silu", "swish"), "silu")
    fields.expect("moe_layer_freq", (1,), 1)
    fields.expect("attention_bias", (False,), False)
    fields.expect("mlp_bias", (False,), False)
    fields.expect("rope_interleave", (True,), True)
    fields.expect("is_causal", (True,), True)
    fields.expect("partial_rotary_factor", (1, 1.0), 1.0)


def _count_dense(fields: Fields, family: _Family, moe: HfMoe | None, n_layer: int) -> int:
    if moe is None:
        return n_layer
    kinds = fields.get("mlp_layer_types")
    if kinds is not None:  # newer files say it layer by layer
        n_dense = kinds.count("dense") if isinstance(kinds, list) else 0
        fields.require(
            kinds == ["dense"] * n_dense + ["sparse"] * (n_layer - n_dense),
            f"mlp_layer_types: accepted: one of dense, sparse for each of the {n_layer} layers, "
            "dense ones first",
        )
        return n_dense
    return fields.integer(
        "first_k_dense_replace", family.first_k_dense_replace, low=0, high=n_layer
    )


def _read_moe(fields: Fields, family: _Family) -> HfMoe | None:
    n_expert = fields.integer("n_routed_experts", 0, low=0)
    if n_expert == 0:
        return None
    method = fields.choice("topk_method", tuple(_TOPK_METHODS), family.topk_method)
    has_groups, has_bias = _TOPK_METHODS[method]
    n_group = fields.integer("n_group", family.n_group) if has_groups else 1
    fields.require(
        n_expert % n_group == 0,
        f"n_group: found {n_group}; accepted: a divisor of the {n_expert} experts",
    )
    return HfMoe(
        n_expert=n_expert,
        n_expert_used=fields.integer("num_experts_per_tok", high=n_expert),
        n_expert_shared=fields.integer("n_shared_experts", 0, low=0),
        d_ff=fields.integer("moe_intermediate_size"),
        gating=fields.choice("scoring_func", ("softmax", "sigmoid"), family.gating),  # type: ignore[arg-type]
        has_bias=has_bias,
        n_group=n_group,
        n_group_used=fields.integer("topk_group", family.topk_group, high=n_group)
        if has_groups
        else 1,
        weights_norm=fields.flag("norm_topk_prob", family.norm_topk_prob),
        weights_scale=fields.number("routed_scaling_factor", family.routed_scaling_factor),
    )


def _read_rope(fields: Fields) -> HfRope:
    """Of ``rope_parameters`` (new) or ``rope_scaling`` with ``rope_theta`` beside it (old)."""
    nested = fields.child("rope_parameters") or fields.child("rope_scaling")
    theta = fields.number("rope_theta", 10000.0)
    if nested is None:
        return HfRope(theta)
    theta = nested.number("rope_theta", theta)
    kind = nested.choice(
        "rope_type", ("yarn", "linear", "default", "none"), nested.text("type", "default")
    )
    nested.expect("partial_rotary_factor", (1, 1.0), 1.0)
    if kind in ("default", "none"):
        return HfRope(theta)
    factor = nested.number("factor")
    if kind == "linear":
        return HfRope(theta, "linear", factor)
    nested.expect("attention_factor", (1, 1.0), 1.0)
    nested.expect("extrapolation_factor", (1, 1.0), 1.0)
    nested.expect("truncate", (True,), True)
    _check_mscale(nested)
    return HfRope(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_context=nested.integer(
            "original_max_position_embeddings",
            fields.integer("original_max_position_embeddings", 0, low=0) or None,
        ),
        beta_fast=nested.optional_number("beta_fast"),
        beta_slow=nested.optional_number("beta_slow"),
        mscale_all_dim=nested.optional_number("mscale_all_dim"),
    )


def _check_mscale(nested: Fields) -> None:
    """Files have one number for both magnitudes: the other one must follow from it."""
    mscale = nested.optional_number("mscale")
    all_dim = nested.optional_number("mscale_all_dim")
    follows = mscale in (None, 0.0, 1.0) if not all_dim else (mscale or 1.0) == all_dim
    nested.require(
        follows,
        f"mscale: found {mscale} with mscale_all_dim {all_dim}; accepted: equal values",
    )


def _read_fp8_block(fields: Fields) -> tuple[int, int]:
    nested = fields.child("quantization_config")
    if nested is None:
        return (128, 128)
    nested.expect("quant_method", ("fp8",), "fp8")
    nested.expect("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    block = nested.get("weight_block_size", [128, 128])
    is_pair = isinstance(block, list) and len(block) == 2
    if is_pair and all(type(size) is int and size > 0 for size in block):
        return (block[0], block[1])
    nested.require(False, f"weight_block_size: found {block!r}; accepted: two positive integers")
    return (128, 128)
