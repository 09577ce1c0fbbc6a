"""Which element format each tensor gets under a file type's name, as quantizers choose them.

A file called Q4_K_M is a mix: most tensors in Q4_K, sensitive ones in a wider format, and rows that
are no multiple of the block in the next format with smaller blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from ..errors import UsageError
from ..formats import by_name


@dataclass(frozen=True)
class Mix:
    """A file type: its number in ``general.file_type`` and the formats of its tensors.

    ``output`` is for the output matrix (and an embedding that serves as one). ``down`` and
    ``kv_b`` name the format of the more sensitive layers' feed-forward down-projections and joint
    key-value expansions, ``attn_output`` that of the attention's output. None means ``base``.
    """

    file_type: int
    base: str
    output: str | None = None
    down: str | None = None
    kv_b: str | None = None
    attn_output: str | None = None
    every_layer: bool = False


MIXES: MappingProxyType[str, Mix] = MappingProxyType(
    {
        "f32": Mix(0, "F32"),
        "f16": Mix(1, "F16"),
        "bf16": Mix(32, "BF16"),
        "q4_0": Mix(2, "Q4_0", output="Q6_K"),
        "q4_1": Mix(3, "Q4_1", output="Q6_K"),
        "q5_0": Mix(8, "Q5_0", output="Q6_K"),
        "q5_1": Mix(9, "Q5_1", output="Q6_K"),
        "q8_0": Mix(7, "Q8_0"),
        "q2_k": Mix(
            10,
            "Q2_K",
            output="Q6_K",
            down="Q3_K",
            kv_b="Q3_K",
            attn_output="Q3_K",
            every_layer=True,
        ),
        "q3_k_m": Mix(
            12,
            "Q3_K",
            output="Q6_K",
            down="Q4_K",
            kv_b="Q4_K",
            attn_output="Q4_K",
            every_layer=True,
        ),
        "q4_k_m": Mix(15, "Q4_K", output="Q6_K", down="Q6_K", kv_b="Q6_K"),
        "q5_k_m": Mix(17, "Q5_K", output="Q6_K", down="Q6_K", kv_b="Q6_K"),
        "q6_k": Mix(18, "Q6_K"),
        "iq4_nl": Mix(25, "IQ4_NL", output="Q6_K"),
        "iq4_xs": Mix(30, "IQ4_XS", output="Q6_K"),
    }
)

#: Where rows do not fill the blocks of the wanted format: nearest in size with 32-element blocks.
_FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}


def mix_named(name: str) -> Mix:
    """The file type called ``name``, in any case. Raises UsageError naming the known ones."""
    found = MIXES.get(name.lower())
    if found is None:
        raise UsageError(f"type {name!r} is unknown; accepted are {', '.join(MIXES)}")
    return found


def tensor_format(
    mix: Mix, name: str, shape: tuple[int, ...], *, layer: int, n_layer: int, tied: bool
) -> str:
    """The format of the weight matrix ``name``, whose rows are ``shape[-1]`` elements long."""
    wanted = _wanted(mix, name, mix.every_layer or _is_sensitive(layer, n_layer), tied) or mix.base
    if shape[-1] % by_name(wanted).block_elems:
        wanted = _FALLBACK.get(wanted, "F16")
    if shape[-1] % by_name(wanted).block_elems:
        wanted = "F16"
    return wanted


def _wanted(mix: Mix, name: str, sensitive: bool, tied: bool) -> str | None:
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return mix.output
    if ".attn_output." in name:
        return mix.attn_output
    if ".ffn_down" in name and sensitive:
        return mix.down
    if ".attn_kv_b." in name and sensitive:
        return mix.kv_b
    return None


def _is_sensitive(layer: int, n_layer: int) -> bool:
    """The first and the last eighth of the layers, and every third one between."""
    eighth = n_layer // 8
    return layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2
