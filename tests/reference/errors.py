"""Measures of how far a result is from the float64 one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

EPS = float(np.finfo(np.float32).eps)  # relative distance of neighbouring float32: 1.19e-7


def nmse(got: npt.NDArray[Any], want: npt.NDArray[np.float64]) -> float:
    """Normalized mean squared error: |got - want|^2 / |want|^2; 0 for an exact zero."""
    got64 = np.asarray(got, np.float64)
    assert got64.shape == want.shape, f"shape {got64.shape}, expected {want.shape}"
    energy = float(np.sum(want * want))
    error = float(np.sum((got64 - want) ** 2))
    if energy == 0:
        return 0.0 if error == 0 else float("inf")
    return error / energy


def assert_ulps(
    got: npt.NDArray[Any],
    want: npt.NDArray[np.float64],
    ulps: float | npt.NDArray[np.float64],
    size: npt.NDArray[np.float64] | None = None,
) -> None:
    """Every element of ``got`` is float32 and within ``ulps`` spacings of ``size``.

    ``size`` is what the error is relative to, |want| itself by default. Infinities and NaN must
    agree; a difference below the smallest normal float32 passes.
    """
    assert got.dtype == np.float32
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    bound = ulps * EPS * np.abs(want if size is None else size) + np.finfo(np.float32).tiny
    error = np.abs(got.astype(np.float64) - np.where(finite, want, 0))
    worst = np.max(np.where(finite, error / np.where(finite, bound, 1), 0), initial=0)
    assert worst <= 1, f"error is {worst:.3g} times the bound"
