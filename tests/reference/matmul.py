"""Matrix products: batched with broadcast weights, by expert, and fused with SwiGLU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from reference.swiglu import swiglu

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]


def matmul(x: Array, w: Array, *, transpose_w: bool = False, residual: Array | None = None) -> F64:
    """x [.., M, K], w [.., N, K] (transpose_w: [.., K, N]) -> [.., M, N].

    w's index along a leading dim is x's index // (x's extent // w's extent).
    """
    rank = max(x.ndim, w.ndim)
    x4 = x.astype(np.float64).reshape((1,) * (4 - x.ndim) + x.shape)
    w4 = w.astype(np.float64).reshape((1,) * (4 - w.ndim) + w.shape)
    if transpose_w:
        w4 = np.swapaxes(w4, 2, 3)
    out = np.zeros((*x4.shape[:3], w4.shape[2]))
    for i, j in np.ndindex(*x4.shape[:2]):
        wi = i // (x4.shape[0] // w4.shape[0])
        wj = j // (x4.shape[1] // w4.shape[1])
        out[i, j] = np.einsum("mk,nk->mn", x4[i, j], w4[wi, wj])
    out = out.reshape(out.shape[4 - rank :])
    return out if residual is None else out + residual.astype(np.float64)


def matmul_indexed(
    x: Array,
    w: Array,
    ids: npt.NDArray[np.int32],
    *,
    weights: Array | None = None,
    residual: Array | None = None,
) -> F64:
    """x [T, A or 1, K], w [E, N, K], ids [T, A] -> [T, A, N]; with weights [T, A] -> [T, N]."""
    n_tokens, n_used = ids.shape
    out = np.zeros((n_tokens, n_used, w.shape[1]))
    for t, a in np.ndindex(n_tokens, n_used):
        row = x[t, a if x.shape[1] > 1 else 0].astype(np.float64)
        out[t, a] = w[ids[t, a]].astype(np.float64) @ row
    if weights is None:
        return out
    summed: F64 = np.einsum("tan,ta->tn", out, weights.astype(np.float64))
    return summed if residual is None else summed + residual.astype(np.float64)


def swiglu_matmul(
    x: Array, gate: Array, up: Array, *, ids: npt.NDArray[np.int32] | None = None
) -> F64:
    """swiglu(x gate^T, x up^T); with ids [T, A]: x [T, K], experts [E, N, K] -> [T, A, N]."""
    if ids is None:
        return swiglu(matmul(x, gate), matmul(x, up))
    rows = x[:, None, :]
    return swiglu(matmul_indexed(rows, gate, ids), matmul_indexed(rows, up, ids))
