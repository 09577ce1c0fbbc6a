"""The k largest numbers, by sorting all of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def top_k(x: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int32]:
    """Ids [M, k] of the largest in each row of x [M, V]; ties to the lower id, NaN last."""
    rows = x.astype(np.float64)
    order = [np.lexsort((np.arange(len(row)), -row, np.isnan(row)))[:k] for row in rows]
    return np.array(order, np.int32).reshape(len(x), k)
