"""The k largest numbers, by sorting all of them; sums of exponentials."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def top_k(x: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int32]:
    """Ids [M, k] of the largest in each row of x [M, V]; ties to the lower id, NaN last."""
    rows = x.astype(np.float64)
    order = [np.lexsort((np.arange(len(row)), -row, np.isnan(row)))[:k] for row in rows]
    return np.array(order, np.int32).reshape(len(x), k)


def exp_sums(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Sum of e^(x - largest) of each row of x [M, V], NaN where that is no number."""
    rows = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.exp(rows - rows.max(axis=1, keepdims=True)).sum(axis=1))
