"""x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def rms_norm(
    x: npt.NDArray[Any], weight: npt.NDArray[Any] | None, eps: float
) -> npt.NDArray[np.float64]:
    """x [.., D], weight [D] or None."""
    wide = x.astype(np.float64)
    mean = np.einsum("...d,...d->...", wide, wide) / max(wide.shape[-1], 1)
    # eps reaches the core as a float32
    root = np.sqrt(mean + np.float64(np.float32(eps)))[..., None]
    unit = np.divide(wide, root, out=np.zeros_like(wide), where=root != 0)
    return unit if weight is None else unit * weight.astype(np.float64)
