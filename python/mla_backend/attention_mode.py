"""Absorbed or expanded: which contraction a chunk's attention takes.

Per head, T queries over S cached positions cost, in multiply-adds:

    absorbed  T S (2 C + R) + T C (N + V)     queries and outputs pass k_b and v_b
    expanded  T S (N + R + V) + S C (N + V)   every cached position does

They are equal at T = b S / (b + S) with b = C (N + V) / (2 C - N - V): 171 for the real models. A
fresh prompt (T = S) always expands.
"""

from __future__ import annotations

from typing import Final, Literal

from mla_backend.config import ModelConfig

AttentionMode = Literal["auto", "absorbed", "expanded"]
MODES: Final = ("auto", "absorbed", "expanded")


def expands(config: ModelConfig, mode: AttentionMode, n_tokens: int, n_cells: int) -> bool:
    """Whether ``n_tokens`` new tokens over ``n_cells`` positions, themselves included, expand."""
    if mode != "auto":
        return mode == "expanded"
    saved = 2 * config.kv_lora_rank - config.d_nope - config.d_value
    if saved <= 0:
        return False  # keys and values are no smaller than latents: nothing to gain
    b = config.kv_lora_rank * (config.d_nope + config.d_value) / saved
    return n_tokens >= b * n_cells / (b + n_cells)
