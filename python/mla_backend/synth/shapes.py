"""The dimensions of a model, and those of published ones under short names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from ..config import Gating
from ..errors import UsageError


@dataclass(frozen=True)
class Yarn:
    """Context extension: trained on ``original_context`` positions, stretched by ``factor``."""

    factor: float
    original_context: int
    mscale_all_dim: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelShape:
    """Everything that fixes the tensors and the metadata of a random model.

    Attributes:
        d_model: width of the residual stream.
        n_layer: layers in total; the first ``n_layer_dense`` have a plain feed-forward block.
        n_head: attention heads of ``nope`` + ``rope`` numbers (queries, keys) and ``value``.
        q_lora_rank: width of the query latent; None projects queries in one step.
        kv_lora_rank: width of the cached latent.
        d_ff, d_ff_expert: inner width of a plain feed-forward block and of one expert.
        n_expert: routed experts, ``n_expert_used`` of them per token; 0 means a dense model.
        n_expert_shared: experts that every token passes, stored as one block.
        gating: how router scores are computed; ``sigmoid`` comes with a selection bias.
        n_group, n_group_used: expert groups, and how many of them a token may choose from.
        normalize, weights_scale: expert weights are divided by their sum, then scaled.
        pre: pre-tokenizer, which also decides where the special tokens stand.
        vocab: token ids. context: trained length in positions.
        tied: the embedding serves as output matrix too.
    """

    d_model: int
    n_layer: int
    n_layer_dense: int
    n_head: int
    q_lora_rank: int | None
    kv_lora_rank: int
    d_ff: int
    d_ff_expert: int
    n_expert: int
    n_expert_used: int
    n_expert_shared: int
    vocab: int
    context: int
    nope: int = 128
    rope: int = 64
    value: int = 128
    gating: Gating = "softmax"
    n_group: int = 1
    n_group_used: int = 1
    normalize: bool = False
    weights_scale: float = 1.0
    rope_base: float = 10000.0
    yarn: Yarn | None = None
    rms_epsilon: float = 1e-6
    pre: Literal["deepseek-llm", "deepseek-v3"] = "deepseek-llm"
    tied: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError where the numbers contradict each other."""
        if not 0 <= self.n_layer_dense <= self.n_layer or self.n_layer < 1:
            raise UsageError(
                f"{self.n_layer} layers, {self.n_layer_dense} of them dense; "
                "accepted: at least 1 layer, and no more dense ones than layers"
            )
        if self.n_expert == 0:
            return
        if not 1 <= self.n_expert_used <= self.n_expert:
            raise UsageError(
                f"{self.n_expert_used} of {self.n_expert} experts used; accepted: 1 to all of them"
            )
        if self.n_expert % self.n_group or not 1 <= self.n_group_used <= self.n_group:
            raise UsageError(
                f"{self.n_expert} experts in {self.n_group} groups of which {self.n_group_used} "
                "are used; accepted: equal groups, 1 to all of them used"
            )
        if self.n_expert_used > self.n_expert // self.n_group * self.n_group_used:
            raise UsageError(
                f"{self.n_expert_used} experts used, but {self.n_group_used} groups hold "
                f"{self.n_expert // self.n_group * self.n_group_used}"
            )

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` has experts."""
        return self.n_expert > 0 and layer >= self.n_layer_dense


def shape_named(
    name: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    vocab: int | None = None,
    context: int | None = None,
) -> ModelShape:
    """The shape called ``name``, made smaller or larger where a number is given.

    ``layers`` keeps at least one layer with experts; ``experts`` reduces groups and active experts
    to what still fits.

    Raises UsageError where the name is unknown or a number does not fit.
    """
    found = SHAPES.get(name)
    if found is None:
        raise UsageError(f"shape {name!r} is unknown; accepted are {', '.join(SHAPES)}")
    if layers is not None:
        dense = min(found.n_layer_dense, max(layers - 1, 0)) if found.n_expert else layers
        found = replace(found, n_layer=layers, n_layer_dense=dense)
    if experts is not None:
        found = _with_experts(found, experts)
    return replace(
        found,
        vocab=found.vocab if vocab is None else vocab,
        context=found.context if context is None else context,
    )


def _with_experts(shape: ModelShape, experts: int) -> ModelShape:
    if experts == 0:
        return replace(
            shape, n_expert=0, n_expert_used=0, n_expert_shared=0, n_layer_dense=shape.n_layer
        )
    # Groups are chosen by the scores of their two best experts.
    groups = shape.n_group if experts % shape.n_group == 0 and experts >= 2 * shape.n_group else 1
    groups_used = min(shape.n_group_used, groups)
    used = min(shape.n_expert_used, experts // groups * groups_used)
    return replace(
        shape,
        n_expert=experts,
        n_expert_used=used,
        n_group=groups,
        n_group_used=groups_used,
    )


_V2_LITE = ModelShape(
    d_model=2048,
    n_layer=27,
    n_layer_dense=1,
    n_head=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    d_ff=10944,
    d_ff_expert=1408,
    n_expert=64,
    n_expert_used=6,
    n_expert_shared=2,
    vocab=102400,
    context=163840,
    yarn=Yarn(40.0, 4096, mscale_all_dim=0.707),
)
_V3 = ModelShape(
    d_model=7168,
    n_layer=61,
    n_layer_dense=3,
    n_head=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    d_ff=18432,
    d_ff_expert=2048,
    n_expert=256,
    n_expert_used=8,
    n_expert_shared=1,
    gating="sigmoid",
    n_group=8,
    n_group_used=4,
    normalize=True,
    weights_scale=2.5,
    vocab=129280,
    context=163840,
    yarn=Yarn(40.0, 4096),
    pre="deepseek-v3",
)
_TINY_V2 = replace(
    _V2_LITE,
    d_model=256,
    n_layer=3,
    n_head=4,
    kv_lora_rank=256,
    d_ff=160,
    d_ff_expert=96,
    n_expert=6,
    n_expert_used=3,
    vocab=1024,
    context=10240,
    yarn=Yarn(40.0, 256, mscale_all_dim=0.707),
)
_TINY_V3 = replace(
    _V3,
    d_model=256,
    n_layer=3,
    n_layer_dense=1,
    n_head=2,
    q_lora_rank=256,
    kv_lora_rank=256,
    d_ff=256,
    d_ff_expert=64,
    n_expert=16,
    n_expert_used=4,
    n_group=4,
    n_group_used=2,
    vocab=1024,
    context=10240,
    yarn=Yarn(40.0, 256),
)

#: Published dimensions. The tiny ones are laid out like the large ones but run anywhere; every
#: shape has one of the two synthetic vocabularies, so ids of other families' tokens differ.
SHAPES: MappingProxyType[str, ModelShape] = MappingProxyType(
    {
        "tiny-v2": _TINY_V2,
        "tiny-v3": _TINY_V3,
        "tiny-dense": replace(
            _TINY_V2,
            n_layer_dense=3,
            n_expert=0,
            n_expert_used=0,
            n_expert_shared=0,
            d_ff=512,
            tied=True,
        ),
        "v2-lite": _V2_LITE,
        "v2": replace(
            _V2_LITE,
            d_model=5120,
            n_layer=60,
            n_head=128,
            q_lora_rank=1536,
            d_ff=12288,
            d_ff_expert=1536,
            n_expert=160,
            n_group=8,
            n_group_used=3,
            weights_scale=16.0,
        ),
        "v3": _V3,
        "kimi-k2": replace(
            _V3,
            n_layer_dense=1,
            n_head=64,
            n_expert=384,
            n_group=1,
            n_group_used=1,
            weights_scale=2.827,
            vocab=163840,
            context=131072,
            rope_base=50000.0,
            yarn=Yarn(32.0, 4096, beta_fast=1.0),
        ),
        "moonlight": replace(
            _V2_LITE,
            d_ff=11264,
            gating="sigmoid",
            normalize=True,
            weights_scale=2.446,
            vocab=163840,
            context=8192,
            rope_base=50000.0,
            yarn=None,
            rms_epsilon=1e-5,
            pre="deepseek-v3",
        ),
        "glm-4.7-flash": replace(
            _V3,
            d_model=2048,
            n_layer=47,
            n_layer_dense=1,
            n_head=20,
            q_lora_rank=768,
            nope=192,
            value=256,
            d_ff=10240,
            d_ff_expert=1536,
            n_expert=64,
            n_expert_used=4,
            n_group=1,
            n_group_used=1,
            weights_scale=1.8,
            vocab=154880,
            context=202752,
            rope_base=1000000.0,
            yarn=None,
            rms_epsilon=1e-5,
        ),
    }
)
