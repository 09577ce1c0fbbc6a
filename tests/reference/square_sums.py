"""Squares of inputs, summed by column."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def square_sums(
    x: npt.NDArray[Any], ids: npt.NDArray[np.int32] | None = None, n_experts: int = 0
) -> tuple[F64, Counts]:
    """Sums [G, K] and counts [G].

    x [.., M, K]: one group per matrix. With ids [T, A]: x [T, A or 1, K], one group per expert.
    """
    squares = np.square(x.astype(np.float64))
    if ids is None:
        by_matrix = squares.reshape(-1, *x.shape[-2:])
        return by_matrix.sum(axis=1), np.full(len(by_matrix), x.shape[-2])
    full = np.broadcast_to(squares, (*ids.shape, x.shape[-1])).reshape(-1, x.shape[-1])
    chosen = np.arange(n_experts)[:, None] == ids.reshape(1, -1)  # [E, T * A]
    return chosen.astype(np.float64) @ full, chosen.sum(axis=1)
