"""silu(gate) * up, silu(x) = x / (1 + e^-x)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def swiglu(gate: npt.NDArray[Any], up: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Both of one shape."""
    wide = gate.astype(np.float64)
    # logaddexp(0, -x) = log(1 + e^-x) without overflow
    return wide * np.exp(-np.logaddexp(0, -wide)) * up.astype(np.float64)
