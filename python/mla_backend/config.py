"""ModelConfig: what a model file's metadata says, validated once and frozen.

Older files lack keys; their defaults are here. ``config_keys`` judges the keys not read here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from .config_keys import ARCHITECTURE, Keys
from .errors import ModelError
from .gguf import GGUFFile, TensorInfo

Layout = Literal["split", "legacy"]
Scaling = Literal["none", "linear", "yarn"]
Gating = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2_sum"]

# Far above any model, low enough that a damaged count does not make endless lists of weights.
_MAX_LAYERS = 4096
#: ``expert_gating_func`` of files.
GATING_CODES: Final[Mapping[Gating, int]] = MappingProxyType({"softmax": 1, "sigmoid": 2})
# The models' own code uses this epsilon for the norms of both latents, whatever the file says.
_LATENT_RMS_EPS = 1e-6


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of interleaved pairs.

    Attributes:
        n_dims: rotated numbers per head, R.
        freq_base: base of the geometric row of frequencies.
        scaling: how positions beyond the original context are reached.
        factor: context extension, 1 without scaling.
        original_context: positions trained before the extension.
        beta_fast, beta_slow: rotations within the original context between which YaRN blends.
        log_multiplier: 0.1 * mscale_all_dim, 0 where the file has none.
        attn_factor: explicit scale of sine and cosine, or None.
    """

    n_dims: int
    freq_base: float
    scaling: Scaling
    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    log_multiplier: float
    attn_factor: float | None


@dataclass(frozen=True)
class MoeConfig:
    """Routed and shared experts of the layers after the leading dense ones.

    Attributes:
        n_expert, n_expert_used: routed experts, and those chosen per token.
        n_expert_shared: experts that see every token; they act as one of their summed width.
        d_ff: width of one expert.
        gating: how router logits become scores.
        has_bias: a per-expert bias is added to the scores for choosing, never for weighting.
        n_group, n_group_used: groups of neighbouring experts, and those chosen first; 1 and 1
            without groups.
        group_score: a group counts its best score, or the sum of its two best.
        weights_norm: chosen scores are divided by their sum.
        weights_scale: and multiplied by this.
    """

    n_expert: int
    n_expert_used: int
    n_expert_shared: int
    d_ff: int
    gating: Gating
    has_bias: bool
    n_group: int
    n_group_used: int
    group_score: GroupScore
    weights_norm: bool
    weights_scale: float


@dataclass(frozen=True)
class ModelConfig:
    """One model. Widths are counts of numbers.

    Attributes:
        layout: "split" files hold attn_k_b and attn_v_b, "legacy" ones attn_kv_b.
        n_layer: layers that are computed; the first ``n_layer_dense`` have no experts.
        n_layer_nextn: multi-token-prediction layers after those, present but not computed.
        d_model: width of the residual stream, D.
        n_head: attention heads, H.
        d_nope, d_rope, d_value: per head, N, R and V.
        kv_lora_rank: the cached latent, C.
        q_lora_rank: the query latent, or None where queries come straight from D.
        d_ff: width of the dense feed-forward layers, 0 where there is none.
        n_vocab: rows of the embedding.
        n_ctx_train: positions the model is made for.
        rms_eps, latent_rms_eps: epsilons of the norms over D, and over the two latents.
        tied_embeddings: the embedding also serves as output projection.
        moe: None for models without experts.
    """

    layout: Layout
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
    latent_rms_eps: float
    tied_embeddings: bool
    rope: RopeConfig
    moe: MoeConfig | None

    @property
    def d_key(self) -> int:
        """Numbers per expanded key and query head: N + R."""
        return self.d_nope + self.d_rope

    @property
    def d_cache(self) -> int:
        """Numbers cached per position and layer: C + R."""
        return self.kv_lora_rank + self.d_rope

    @property
    def softmax_scale(self) -> float:
        """Factor of attention scores, mscale^2 / sqrt(N + R), in latent space as well."""
        mscale = 1.0
        if self.rope.factor > 1.0:
            mscale += self.rope.log_multiplier * math.log(self.rope.factor)
        return mscale * mscale / math.sqrt(self.d_key)


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Read the configuration of a model file.

    Raises:
        ModelError: another architecture, or one message with everything that is missing,
            implausible or not implemented.
    """
    _check_architecture(file)
    keys = Keys(file.metadata)
    config = _read_model(keys, file.tensors)
    keys.refuse_others()
    if keys.problems:
        lines = "".join(f"\n  {problem}" for problem in keys.problems)
        raise ModelError(f"{file.paths[0]}: the metadata cannot be used:{lines}")
    return config


def _check_architecture(file: GGUFFile) -> None:
    found = file.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        shown = "no such key" if found is None else repr(found)
        raise ModelError(
            f"{file.paths[0]}: general.architecture: found {shown}; accepted: {ARCHITECTURE!r}"
        )
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(f"{file.paths[0]}: general.type: found {kind!r}; accepted: 'model'")


def _read_model(keys: Keys, tensors: Mapping[str, TensorInfo]) -> ModelConfig:
    n_layer, n_layer_nextn = _count_layers(keys, tensors)
    n_layer_dense, moe = _read_feed_forward(keys, n_layer, tensors)
    n_ctx_train = keys.integer("context_length")
    rope = _read_rope(keys, n_ctx_train)
    n_head = keys.integer("attention.head_count")
    _check_attention(keys, n_head)
    d_nope, d_value = _head_widths(keys, n_head, rope.n_dims, tensors)
    return ModelConfig(
        layout=_layout(keys, tensors),
        n_layer=n_layer,
        n_layer_dense=n_layer_dense,
        n_layer_nextn=n_layer_nextn,
        d_model=keys.integer("embedding_length"),
        n_head=n_head,
        d_nope=d_nope,
        d_rope=rope.n_dims,
        d_value=d_value,
        kv_lora_rank=keys.integer("attention.kv_lora_rank"),
        q_lora_rank=keys.integer("attention.q_lora_rank", 0) or None,
        d_ff=keys.integer("feed_forward_length", None if n_layer_dense else 0),
        n_vocab=_n_vocab(keys, tensors),
        n_ctx_train=n_ctx_train,
        rms_eps=keys.number("attention.layer_norm_rms_epsilon", high=0.1),
        latent_rms_eps=_LATENT_RMS_EPS,
        tied_embeddings="output.weight" not in tensors,
        rope=rope,
        moe=moe,
    )


def _count_layers(keys: Keys, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """Computed layers, and prediction layers, which block_count includes."""
    n_block = keys.integer("block_count", high=_MAX_LAYERS)
    n_nextn = keys.integer("nextn_predict_layers", 0, low=0, high=n_block)
    for layer in range(n_block - n_nextn, n_block):
        # Their own tensors tell them from ordinary layers.
        marked = any(name.startswith(f"blk.{layer}.nextn.") for name in tensors)
        keys.require(
            n_nextn < n_block and (marked or f"blk.{layer}.attn_norm.weight" not in tensors),
            f"nextn_predict_layers: found {n_nextn}, but layer {layer} is an ordinary one; "
            "accepted: the number of prediction layers that block_count includes",
        )
    return max(1, n_block - n_nextn), n_nextn


def _read_feed_forward(
    keys: Keys, n_layer: int, tensors: Mapping[str, TensorInfo]
) -> tuple[int, MoeConfig | None]:
    """Leading dense layers, and what the others do."""
    moe = _read_moe(keys, tensors)
    n_layer_dense = keys.integer("leading_dense_block_count", 0, low=0)
    if moe is None or n_layer_dense == n_layer:
        return n_layer, None
    keys.require(
        n_layer_dense < n_layer,
        f"leading_dense_block_count: found {n_layer_dense}; accepted: at most {n_layer} layers",
    )
    return n_layer_dense, moe


def _layout(keys: Keys, tensors: Mapping[str, TensorInfo]) -> Layout:
    """What the tensors say; without any, the keys: then the missing ones can be named."""
    if _first(tensors, ".attn_k_b.weight") or _first(tensors, ".attn_v_b.weight"):
        return "split"
    legacy = _first(tensors, ".attn_kv_b.weight") or not keys.has("attention.key_length_mla")
    return "legacy" if legacy else "split"


def _head_widths(
    keys: Keys, n_head: int, d_rope: int, tensors: Mapping[str, TensorInfo]
) -> tuple[int, int]:
    """N and V: from the ``*_mla`` keys, the split tensors, or the keys of legacy files.

    Split files have the last as well, but mean the latent by them.
    """
    k_b, v_b = _first(tensors, ".attn_k_b.weight"), _first(tensors, ".attn_v_b.weight")
    d_key = k_b.shape[-1] + d_rope if k_b else 0
    d_value = math.prod(v_b.shape[:-1]) // n_head if v_b else 0
    d_key = keys.integer("attention.key_length_mla", 0) or d_key
    d_value = keys.integer("attention.value_length_mla", 0) or d_value
    d_key = d_key or keys.integer("attention.key_length")
    d_value = d_value or keys.integer("attention.value_length")
    keys.ignore("attention.key_length", "attention.value_length")
    keys.require(
        d_key > d_rope,
        f"attention key length: found {d_key}; accepted: more than the {d_rope} rotated numbers",
    )
    return max(1, d_key - d_rope), d_value


def _first(tensors: Mapping[str, TensorInfo], suffix: str) -> TensorInfo | None:
    return next((info for name, info in tensors.items() if name.endswith(suffix)), None)


def _check_attention(keys: Keys, n_head: int) -> None:
    keys.require(
        keys.flag("attention.causal", True),
        f"{ARCHITECTURE}.attention.causal = False: not implemented: attention to later positions",
    )
    n_head_kv = keys.integer("attention.head_count_kv", 1)
    keys.require(
        n_head_kv in (1, n_head),
        f"attention.head_count_kv: found {n_head_kv}; accepted: 1 or {n_head}",
    )


def _n_vocab(keys: Keys, tensors: Mapping[str, TensorInfo]) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        return keys.integer("vocab_size")  # the embedding itself is reported with the weights
    n_vocab = keys.integer("vocab_size", embedding.shape[0])
    keys.require(
        n_vocab == embedding.shape[0],
        f"vocab_size: found {n_vocab}; accepted: {embedding.shape[0]}, the rows of token_embd",
    )
    return n_vocab


def _read_rope(keys: Keys, n_ctx_train: int) -> RopeConfig:
    n_dims = keys.integer("rope.dimension_count", low=2)
    keys.require(n_dims % 2 == 0, f"rope.dimension_count: found {n_dims}; accepted: an even number")
    scaling = keys.text("rope.scaling.type", "linear")
    keys.require(
        scaling in ("none", "linear", "yarn"),
        f"rope.scaling.type: found {scaling!r}; accepted: 'none', 'linear', 'yarn'",
    )
    factor = keys.number("rope.scaling.factor", None if scaling == "yarn" else 1.0)
    if scaling == "yarn":
        keys.require(factor >= 1, f"rope.scaling.factor: found {factor}; accepted: 1 or more")
    if scaling == "none" or factor == 1.0:
        scaling, factor = "none", 1.0
    beta_fast = keys.number("rope.scaling.yarn_beta_fast", 32.0)
    beta_slow = keys.number("rope.scaling.yarn_beta_slow", 1.0)
    keys.require(
        beta_fast >= beta_slow,
        f"rope.scaling.yarn_beta_fast: found {beta_fast}; accepted: at least {beta_slow}, as slow",
    )
    has_attn_factor = keys.has("rope.scaling.attn_factor")
    attn_factor = keys.number("rope.scaling.attn_factor") if has_attn_factor else None
    keys.require(
        scaling == "yarn" or attn_factor in (None, 1.0),
        f"rope.scaling.attn_factor: found {attn_factor}; accepted: 1, unless the type is 'yarn'",
    )
    return RopeConfig(
        n_dims=n_dims,
        freq_base=keys.number("rope.freq_base", 10000.0, low=1.0),
        scaling=scaling,  # type: ignore[arg-type]  # other strings were reported above
        factor=factor,
        original_context=keys.integer("rope.scaling.original_context_length", n_ctx_train),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        log_multiplier=keys.number("rope.scaling.yarn_log_multiplier", 0.0),
        attn_factor=attn_factor,
    )


def _read_moe(keys: Keys, tensors: Mapping[str, TensorInfo]) -> MoeConfig | None:
    n_expert = keys.integer("expert_count", 0, low=0)
    if n_expert == 0:  # a dense model, where the other keys have no meaning
        keys.ignore(*_MOE_KEYS)
        return None
    has_bias = _first(tensors, ".exp_probs_b.bias") is not None
    n_group = keys.integer("expert_group_count", 1, low=0) or 1
    moe = MoeConfig(
        n_expert=n_expert,
        n_expert_used=keys.integer("expert_used_count", high=n_expert),
        n_expert_shared=keys.integer("expert_shared_count", 0, low=0),
        d_ff=keys.integer("expert_feed_forward_length"),
        gating=_gating(keys, has_bias),
        has_bias=has_bias,
        n_group=n_group,
        n_group_used=keys.integer("expert_group_used_count", n_group, low=0) or n_group,
        # The rule came with the selection bias: models without one count a group's best expert.
        group_score="top2_sum" if has_bias else "max",
        weights_norm=keys.flag("expert_weights_norm", False),
        weights_scale=keys.number("expert_weights_scale", 0.0) or 1.0,
    )
    _check_moe(keys, moe)
    return moe


_MOE_KEYS: Final = (
    "expert_used_count",
    "expert_shared_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "expert_gating_func",
    "expert_group_count",
    "expert_group_used_count",
    "expert_weights_norm",
    "expert_weights_scale",
)


def _gating(keys: Keys, has_bias: bool) -> Gating:
    # Files without the key are either from before there were sigmoid models, or of models that
    # have the selection bias, which is made for sigmoid scores.
    found = keys.integer("expert_gating_func", 0, low=0)
    if found == 0:
        return "sigmoid" if has_bias else "softmax"
    problem = f"expert_gating_func: found {found}; accepted: 1 (softmax), 2 (sigmoid)"
    names = {code: name for name, code in GATING_CODES.items()}
    keys.require(found in names, problem)
    return names.get(found, "softmax")


def _check_moe(keys: Keys, moe: MoeConfig) -> None:
    per_group = moe.n_expert // moe.n_group
    fits = (
        moe.n_expert % moe.n_group == 0
        and moe.n_group_used <= moe.n_group
        and moe.n_expert_used <= moe.n_group_used * per_group
        and (moe.n_group == 1 or moe.group_score == "max" or per_group >= 2)
    )
    keys.require(
        fits,
        f"expert groups: found {moe.n_expert} experts in {moe.n_group} groups, "
        f"{moe.n_expert_used} used out of {moe.n_group_used} groups; accepted: equal groups that "
        "hold enough experts",
    )
    summed = moe.n_expert_shared * moe.d_ff
    width = keys.integer("expert_shared_feed_forward_length", summed, low=0)
    keys.require(
        width in (0, summed),
        f"expert_shared_feed_forward_length: found {width}; accepted: {summed}, the shared "
        "experts' sum",
    )
