"""softmax(scale * x + mask) along the last dim."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def logits(
    x: npt.NDArray[Any], mask: npt.NDArray[Any] | None, scale: float
) -> npt.NDArray[np.float64]:
    """The argument: scale * x + mask."""
    z = x.astype(np.float64) * np.float64(np.float32(scale))
    return z if mask is None else z + mask.astype(np.float64)


def softmax(
    x: npt.NDArray[Any], mask: npt.NDArray[Any] | None, scale: float
) -> npt.NDArray[np.float64]:
    """x [.., S]; mask broadcasts to x. A row that is -inf throughout gives zeros."""
    z = logits(x, mask, scale)
    out = np.zeros_like(z)
    for row in np.ndindex(*z.shape[:-1]):
        if z.shape[-1] == 0 or np.all(np.isneginf(z[row])):
            continue
        powers = np.exp(z[row] - z[row].max())
        out[row] = powers / powers.sum()
    return out
