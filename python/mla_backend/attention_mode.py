"""Absorbed or expanded: which contraction a chunk's attention takes.

Per head, T queries over S cached positions cost, in multiply-adds:

    absorbed  T S (2 C + R) + T C (N + V)     queries and outputs pass k_b and v_b
    expanded  T S (N + R + V) + S C (N + V)   every cached position does

They are equal at T = b S / (b + S) with b = C (N + V) / (2 C - N - V): 171 for the real models. The
expanded kernels do more of them per second, which lowers the break-even a little; a fresh prompt
(T = S) always expands.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

AttentionMode = Literal["auto", "absorbed", "expanded"]
MODES: Final = ("auto", "absorbed", "expanded")

#: Multiply-adds per second of the expanded kernels over those of the absorbed ones, long contexts
#: and F16 cells: bench/RESULTS.md, "Attention". Fixed, so that a choice never depends on timing.
_EXPANDED_SPEED: Final = {
    "avx512amx": 1.1,
    "avx512bf16": 1.1,
    "avx512vnni": 1.1,
    "avx2": 1.25,
    "baseline": 1.8,
}


class HeadDims(NamedTuple):
    """Numbers per head: C, N, R and V."""

    latent: int
    nope: int
    rope: int
    value: int


def expands(dims: HeadDims, mode: AttentionMode, n_tokens: int, n_cells: int, isa: str) -> bool:
    """Whether ``n_tokens`` new tokens over ``n_cells`` positions, themselves included, expand."""
    if mode != "auto":
        return mode == "expanded"
    latent, nope, rope, value = dims
    up = latent * (nope + value)
    absorbed = n_tokens * (n_cells * (2 * latent + rope) + up)
    expanded = n_cells * (n_tokens * (nope + rope + value) + up)
    return expanded <= absorbed * _EXPANDED_SPEED.get(isa, 1.0)
