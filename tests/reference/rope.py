"""Rotation of the pairs (2i, 2i+1): multiplication of complex numbers by e^(i angle)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def rope(
    x: npt.NDArray[Any],
    positions: npt.NDArray[np.int32],
    frequencies: npt.NDArray[np.float32],
    scale: float,
) -> npt.NDArray[np.float64]:
    """x [T, H, R] or [T, R], positions [T], frequencies [R/2]."""
    wide = x.astype(np.float64)
    pairs = wide[..., 0::2] + 1j * wide[..., 1::2]
    angle = positions.astype(np.float64)[:, None] * frequencies.astype(np.float64)
    turn = np.exp(1j * angle) * np.float64(np.float32(scale))
    turned = pairs * (turn[:, None] if x.ndim == 3 else turn)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(wide.shape)
