"""Numbers to encode, the same on every machine: the reference errors belong to them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

N_ROWS, N_COLUMNS = 16, 2048
REFERENCE = "reference_errors.json"


def cases() -> dict[str, Floats]:
    """Matrices [N_ROWS, N_COLUMNS] by kind."""
    normal = _normal(1)
    kinds = {
        "normal": normal,
        "heavy": normal / (0.2 + _uniform(2)) ** 0.7,
        "outliers": np.where(_uniform(3) < 0.01, 8 * normal, normal),
        "shifted": 0.3 * normal + 0.5,
        "one-sided": np.abs(normal),
        "sparse": np.where(_uniform(4) < 0.8, 0, normal),
        "columns": normal * np.exp(1.5 * _normal(5)[0]),
        "bfloat16": _as_bfloat16(0.02 * normal),
    }
    return {name: np.ascontiguousarray(x, np.float32) for name, x in kinds.items()}


def importances() -> dict[str, Floats | None]:
    """Importance [N_COLUMNS] by kind."""
    spread = np.exp(1.5 * _normal(6)[0])
    spikes = np.where(np.arange(N_COLUMNS) % 64 == 5, 1e3, 1.0)
    return {
        "none": None,
        "spread": spread.astype(np.float32),
        "spikes": spikes.astype(np.float32),
        "zeros": np.where(_uniform(7)[0] < 0.5, 0, spread).astype(np.float32),
    }


def mean_squared_error(got: Floats, x: Floats, importance: Floats | None) -> float:
    """Mean of squares of the differences, weighted by importance."""
    squares = (got.astype(np.float64) - x) ** 2
    weights = np.ones(x.shape[1]) if importance is None else importance.astype(np.float64)
    return float((squares * weights).sum() / (weights.sum() * len(x)))


def _uniform(seed: int) -> npt.NDArray[np.float64]:
    # Raw bits: their stream never changes, while those of distributions may.
    bits = np.random.PCG64(seed).random_raw(N_ROWS * N_COLUMNS)
    return ((bits >> 11) / 2.0**53).reshape(N_ROWS, N_COLUMNS)


def _normal(seed: int) -> npt.NDArray[np.float64]:
    radius = np.sqrt(-2 * np.log1p(-_uniform(seed + 100)))
    return radius * np.cos(2 * np.pi * _uniform(seed + 200))


def _as_bfloat16(x: npt.NDArray[np.float64]) -> Floats:
    bits = x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)
