"""The same numbers in other memory: what strided operands are tested with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def _contiguous(x: Array) -> Array:
    return np.ascontiguousarray(x)


def _permuted(x: Array) -> Array:
    """Column-major: the innermost stride is the largest."""
    return np.ascontiguousarray(x.T).T


def _gapped(x: Array) -> Array:
    """Every second element along every dim, starting at an odd address."""
    room = np.full([2 * n + 1 for n in x.shape], 77, x.dtype)
    view = room[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    view[...] = x
    return view


def _padded_rows(x: Array) -> Array:
    """Contiguous rows with a gap between them."""
    room = np.full([*x.shape[:-1], x.shape[-1] + 3], 77, x.dtype)
    view = room[..., 1 : 1 + x.shape[-1]]
    view[...] = x
    return view


def _flipped(x: Array) -> Array:
    """Negative strides along every dim."""
    flip = (slice(None, None, -1),) * x.ndim
    return np.ascontiguousarray(x[flip])[flip]


_LAYOUTS = {
    "contiguous": _contiguous,
    "permuted": _permuted,
    "gapped": _gapped,
    "padded_rows": _padded_rows,
    "flipped": _flipped,
}
LAYOUTS = tuple(_LAYOUTS)


def laid_out(x: Array, layout: str) -> Array:
    """The numbers of x (at least one dim) in the memory layout of that name."""
    out = _LAYOUTS[layout](x)
    assert np.array_equal(out.view(f"V{x.itemsize}"), np.asarray(x).view(f"V{x.itemsize}"))
    return out
