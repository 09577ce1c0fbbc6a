"""Frequencies of the rotary embedding, with YaRN's blend of two of them.

Pair i of a head turns by position * f_i:

    f_i = base^(-2i / R)                      no scaling
    f_i = base^(-2i / R) / factor             linear
    f_i = (1 - r_i) * plain + r_i * linear    YaRN, r_i ramping from 0 to 1

Pairs that turn more than beta_fast times within the original context keep their frequency, those
that turn less than beta_slow times are slowed by the factor. This holds at every position.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..config import ModelConfig, RopeConfig


def rope_frequencies(config: ModelConfig) -> npt.NDArray[np.float32]:
    """Radians per position -> float32 [R / 2], computed in float64."""
    rope = config.rope
    pairs = np.arange(rope.n_dims // 2, dtype=np.float64)
    plain = rope.freq_base ** (-2.0 * pairs / rope.n_dims)
    slowed = plain / rope.factor
    if rope.scaling == "yarn":
        low = max(math.floor(_pair_turning(rope, rope.beta_fast)), 0)
        high = min(math.ceil(_pair_turning(rope, rope.beta_slow)), rope.n_dims - 1)
        # The least width keeps a step where both ends fall on one pair.
        ramp = np.clip((pairs - low) / max(high - low, 1e-3), 0.0, 1.0)
        slowed = plain * (1.0 - ramp) + slowed * ramp
    return slowed.astype(np.float32)


def rope_mscale(config: ModelConfig) -> float:
    """Factor of sine and cosine.

    With YaRN it is (0.1 mscale ln factor + 1) / (0.1 mscale_all_dim ln factor + 1). Files store the
    second of the two only where a model sets it, and such models set both alike: 1. Without it,
    mscale is 1 and mscale_all_dim 0. An explicit ``attn_factor`` comes first.
    """
    rope = config.rope
    if rope.scaling != "yarn":
        return 1.0
    if rope.attn_factor is not None:
        return rope.attn_factor
    return 1.0 if rope.log_multiplier > 0.0 else 1.0 + 0.1 * math.log(rope.factor)


def _pair_turning(rope: RopeConfig, rotations: float) -> float:
    """The (fractional) pair that turns this often within the original context."""
    wavelengths = rope.original_context / (rotations * 2.0 * math.pi)
    return rope.n_dims * math.log(wavelengths) / (2.0 * math.log(rope.freq_base))
