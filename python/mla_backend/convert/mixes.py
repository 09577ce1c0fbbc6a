"""Which element format each tensor gets under a file type's name, as quantizers choose them.

A file called Q4_K_M is a mix: most matrices in Q4_K, sensitive ones in a wider format, and rows
that are no multiple of the block in the next format with smaller blocks. The choices are those of
the widespread quantizer, so that files of one name are alike whoever wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from ..errors import UsageError
from ..formats import by_name


@dataclass(frozen=True)
class MixFacts:
    """What the choice depends on beside a tensor's name and shape.

    Attributes:
        n_layer: all layers of the file, prediction layers included.
        n_expert: routed experts, 0 without.
        n_head, n_head_kv: as the file's metadata has them (1 key-value head in split files).
        tied: the embedding also serves as output projection.
        has_importance: the encoders are given an importance for each column.
    """

    n_layer: int
    n_expert: int = 0
    n_head: int = 1
    n_head_kv: int = 1
    tied: bool = False
    has_importance: bool = False

    @property
    def shares_kv(self) -> bool:
        """Four or more query heads read one head of keys and values, which is then precious."""
        return self.n_head >= 4 * self.n_head_kv


@dataclass(frozen=True)
class _Place:
    """One tensor as the rules see it."""

    layer: int
    facts: MixFacts

    @property
    def in_first_eighth(self) -> bool:
        return self.layer < self.facts.n_layer // 8

    @property
    def in_first_sixteenth(self) -> bool:
        return self.layer < self.facts.n_layer // 16

    @property
    def is_sensitive(self) -> bool:
        """The first and the last eighth of the layers, and every third one between."""
        n_layer = self.facts.n_layer
        eighth = n_layer // 8
        late = self.layer >= 7 * n_layer // 8
        return self.layer < eighth or late or (self.layer - eighth) % 3 == 2


#: Gives a format, or None for the base format of the mix.
_Rule = Callable[[_Place], str | None]


def _always(name: str) -> _Rule:
    return lambda place: name


def _if_sensitive(name: str) -> _Rule:
    return lambda place: name if place.is_sensitive else None


def _base(place: _Place) -> None:
    return None


@dataclass(frozen=True)
class Mix:
    """A file type.

    Attributes:
        file_type: its number in ``general.file_type``.
        base: format of matrices without a rule.
        output: format of the output projection; None: the base format.
        down: rule for feed-forward down-projections.
        kv_b: rule for the joint key-value expansion of legacy files.
        attn_output: rule for the output projection of attention.
        boosts_attn_output: with exactly 8 experts the attention's share of the file is so small
            that its output projection gets Q5_K.
        needs_importance: useless without it.
    """

    file_type: int
    base: str
    output: str | None = None
    down: _Rule = _base
    kv_b: _Rule = _base
    attn_output: _Rule = _base
    boosts_attn_output: bool = False
    needs_importance: bool = False


def _q2_kv_b(place: _Place) -> str:
    return "Q4_K" if place.facts.shares_kv else "Q3_K"


def _q3_m_down(place: _Place) -> str:
    return "Q5_K" if place.in_first_sixteenth else "Q4_K"


def _iq4_kv_b(place: _Place) -> str | None:
    return "Q5_K" if place.facts.shares_kv else None


def _iq4_down(place: _Place) -> str | None:
    return "Q5_K" if place.in_first_eighth and not place.facts.has_importance else None


def _guarded_down(name: str) -> _Rule:
    """Importance may wreck the first down-projections under the simplest formats."""
    return lambda place: name if place.in_first_eighth and place.facts.has_importance else None


def _first_layers(name: str, count: int) -> _Rule:
    return lambda place: name if place.layer < count else None


def _first_eighth(name: str) -> _Rule:
    return lambda place: name if place.in_first_eighth else None


MIXES: Final[Mapping[str, Mix]] = MappingProxyType(
    {
        "f32": Mix(0, "F32"),
        "f16": Mix(1, "F16"),
        "bf16": Mix(32, "BF16"),
        "q8_0": Mix(7, "Q8_0"),
        "q4_0": Mix(2, "Q4_0", "Q6_K", down=_guarded_down("Q4_1")),
        "q4_1": Mix(3, "Q4_1", "Q6_K"),
        "q5_0": Mix(8, "Q5_0", "Q6_K", down=_guarded_down("Q5_1")),
        "q5_1": Mix(9, "Q5_1", "Q6_K"),
        "q2_k": Mix(
            10, "Q2_K", "Q6_K", _always("Q3_K"), _q2_kv_b, _always("Q3_K"), boosts_attn_output=True
        ),
        "q2_k_s": Mix(
            21,
            "Q2_K",
            "Q6_K",
            down=_first_eighth("Q4_K"),
            kv_b=lambda place: "Q4_K" if place.facts.shares_kv else None,
            needs_importance=True,
        ),
        "q3_k_s": Mix(11, "Q3_K", "Q6_K", boosts_attn_output=True),
        "q3_k_m": Mix(
            12,
            "Q3_K",
            "Q6_K",
            _q3_m_down,
            lambda place: "Q5_K" if place.layer < 2 else "Q4_K",
            _always("Q4_K"),
            boosts_attn_output=True,
        ),
        "q3_k_l": Mix(13, "Q3_K", "Q6_K", _always("Q5_K"), _always("Q5_K"), _always("Q5_K")),
        "q4_k_s": Mix(
            14,
            "Q4_K",
            "Q6_K",
            _first_eighth("Q5_K"),
            _first_layers("Q5_K", 4),
            boosts_attn_output=True,
        ),
        "q4_k_m": Mix(
            15,
            "Q4_K",
            "Q6_K",
            _if_sensitive("Q6_K"),
            _if_sensitive("Q6_K"),
            boosts_attn_output=True,
        ),
        "q5_k_s": Mix(16, "Q5_K", "Q6_K"),
        "q5_k_m": Mix(17, "Q5_K", "Q6_K", _if_sensitive("Q6_K"), _if_sensitive("Q6_K")),
        "q6_k": Mix(18, "Q6_K", "Q6_K"),
        "iq4_nl": Mix(25, "IQ4_NL", "Q6_K", _iq4_down, _iq4_kv_b, boosts_attn_output=True),
        "iq4_xs": Mix(30, "IQ4_XS", "Q6_K", _iq4_down, _iq4_kv_b, boosts_attn_output=True),
    }
)

#: Names that mean the middle one of three.
_ALIASES: Final = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

#: Where rows do not fill the blocks of the wanted format: nearest in size with 32-element blocks.
_FALLBACK: Final = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
#: And where they do not fill those either.
_LAST_RESORT: Final = "F16"
#: Expert count at which the rules make attention cheap beside the experts.
_FEW_EXPERTS: Final = 8
_PLAIN_NAMES: Final = re.compile(r".*_norm\.weight|.*\.ffn_gate_inp\.weight|.*\.bias")
_LAYER: Final = re.compile(r"blk\.(\d+)\.")


def mix_named(name: str) -> Mix:
    """The file type called ``name``, in any case. Raises UsageError naming the known ones."""
    lower = name.lower()
    found = MIXES.get(_ALIASES.get(lower, lower))
    if found is None:
        raise UsageError(f"type {name!r} is unknown; accepted are {', '.join(MIXES)}")
    return found


def tensor_format(mix: Mix, name: str, shape: tuple[int, ...], facts: MixFacts) -> str:
    """The format of one tensor.

    Args:
        mix: the file type.
        name: the tensor's GGUF name.
        shape: outermost first; rows are ``shape[-1]`` elements long.
        facts: what else the choice depends on.

    Returns:
        A name in ``formats``: F32 for norms, biases, routers and other vectors.
    """
    if is_plain(name, shape):
        return "F32"
    if not by_name(mix.base).quantized:
        return mix.base
    return fallback(_wanted(mix, name, shape, facts), shape[-1])


def is_plain(name: str, shape: tuple[int, ...]) -> bool:
    """Norms, biases, routers and other vectors: they are never quantized."""
    return len(shape) < 2 or _PLAIN_NAMES.fullmatch(name) is not None


def fallback(wanted: str, row_elems: int) -> str:
    """``wanted``, or a format near it whose blocks fit rows of ``row_elems`` elements."""
    for choice in (wanted, _FALLBACK.get(wanted, _LAST_RESORT)):
        if row_elems % by_name(choice).block_elems == 0:
            return choice
    return _LAST_RESORT


def _wanted(mix: Mix, name: str, shape: tuple[int, ...], facts: MixFacts) -> str:
    if name == "output.weight" or (facts.tied and name == "token_embd.weight"):
        if shape[-1] % by_name(mix.base).block_elems:
            return "Q8_0"
        return mix.output or mix.base
    match = _LAYER.match(name)
    if match is None:
        return mix.base
    place = _Place(int(match[1]), facts)
    few_experts = facts.n_expert == _FEW_EXPERTS
    if "attn_kv_b.weight" in name:
        return "Q8_0" if few_experts else mix.kv_b(place) or mix.base
    if "attn_output.weight" in name:
        if few_experts:
            return "Q5_K" if mix.boosts_attn_output else mix.base
        return mix.attn_output(place) or mix.base
    if "ffn_down" in name:
        return mix.down(place) or mix.base
    return mix.base
