"""Log-probabilities of logits, and how two distributions differ, row by row.

Rows are taken a few at a time: the temporaries of a block stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]

_BLOCK_BYTES: Final = 1 << 22


def _blocks(n_rows: int, n_columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (8 * max(n_columns, 1)))
    return (slice(begin, begin + step) for begin in range(0, n_rows, step))


def log_softmax(logits: F32 | F64) -> F64:
    """Logits [.., V] -> log-probabilities, float64 of the same shape."""
    shifted = logits - logits.max(axis=-1, keepdims=True).astype(np.float64)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def token_losses(logits: F32, targets: I32) -> F64:
    """Logits [T, V] and the tokens [T] that came -> -log p of each, float64 [T]."""
    losses = np.empty(len(targets), np.float64)
    for rows in _blocks(*logits.shape):
        log_p = log_softmax(logits[rows])
        losses[rows] = -np.take_along_axis(log_p, targets[rows, None], axis=1)[:, 0]
    return losses


@dataclass(frozen=True)
class Divergence:
    """Two models on the same tokens, all [T].

    Attributes:
        base_losses, losses: -log p of the token that came, float64.
        kl: sum of p_base log(p_base / p) over the vocabulary, float64, in nats.
        same_top: whether both find the same token likeliest.
    """

    base_losses: F64
    losses: F64
    kl: F64
    same_top: npt.NDArray[np.bool_]


def diverge(base: F32, logits: F32, targets: I32) -> Divergence:
    """Compare logits (or log-probabilities) [T, V] with those of a base model."""
    n = len(targets)
    result = Divergence(np.empty(n), np.empty(n), np.empty(n), np.empty(n, np.bool_))
    for rows in _blocks(*logits.shape):
        log_p, log_q = log_softmax(base[rows]), log_softmax(logits[rows])
        at = targets[rows, None]
        result.base_losses[rows] = -np.take_along_axis(log_p, at, axis=1)[:, 0]
        result.losses[rows] = -np.take_along_axis(log_q, at, axis=1)[:, 0]
        # A token of probability 0 counts nothing: its log is -inf.
        p = np.exp(log_p)
        terms = np.where(p > 0, p * (np.where(p > 0, log_p, 0) - log_q), 0)
        result.kl[rows] = terms.sum(axis=1)
        result.same_top[rows] = base[rows].argmax(axis=1) == logits[rows].argmax(axis=1)
    return result


def join(parts: list[Divergence]) -> Divergence:
    """One after the other."""
    return Divergence(
        np.concatenate([part.base_losses for part in parts]),
        np.concatenate([part.losses for part in parts]),
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.same_top for part in parts]),
    )
