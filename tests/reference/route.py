"""Expert routing, in the words of the papers: scores, groups, top-k, weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from reference.softmax import softmax

F64 = npt.NDArray[np.float64]


def scores(logits: npt.NDArray[np.float32], gating: str) -> F64:
    """Affinity of each token to each expert, [T, E]."""
    if gating == "softmax":
        return softmax(logits, None, 1.0)
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))


def _allowed(choice: F64, n_groups: int, n_groups_used: int, group_score: str) -> list[int]:
    """Experts of one token's best groups."""
    groups = choice.reshape(n_groups, -1)
    ranked = np.sort(groups, axis=1)[:, ::-1]
    value = ranked[:, 0] if group_score == "max" else ranked[:, :2].sum(axis=1)
    best = np.argsort(-value, kind="stable")[:n_groups_used]
    width = groups.shape[1]
    return [int(g) * width + i for g in sorted(best) for i in range(width)]


def route(
    logits: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32] | None = None,
    *,
    n_used: int,
    gating: str = "softmax",
    n_groups: int = 1,
    n_groups_used: int = 1,
    group_score: str = "max",
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[npt.NDArray[np.int32], F64]:
    """(ids [T, A], weights [T, A]) for logits [T, E]."""
    score = scores(logits, gating)
    choice = score if bias is None else score + bias.astype(np.float64)
    ids = np.zeros((len(logits), n_used), np.int32)
    weights = np.zeros((len(logits), n_used))
    for t in range(len(logits)):
        allowed = _allowed(choice[t], n_groups, n_groups_used, group_score)
        order = sorted(allowed, key=lambda e: (-choice[t, e], e))
        ids[t] = order[:n_used]
        weights[t] = score[t, ids[t]]
        if normalize:
            weights[t] /= weights[t].sum() + 1e-20
    return ids, weights * scale
