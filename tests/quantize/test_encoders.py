"""Errors of the encoders: against recorded ones of llama.cpp, under importance, in odd cases."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mla_backend import _core
from mla_backend.errors import FormatError, ShapeError
from mla_backend.formats import FORMATS
from quantize.numbers import (
    N_COLUMNS,
    REFERENCE,
    Floats,
    cases,
    importances,
    mean_squared_error,
)

NAMES = [row.name for row in FORMATS if row.quantized]
K = 512


def round_trip(x: Floats, name: str, importance: Floats | None = None) -> Floats:
    return _core.dequantize(_core.quantize(x, name, importance), name, x.shape[1])


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, float]]:
    """Mean squared errors of llama.cpp by format and kind; bench_quantize.py writes them."""
    read: dict[str, dict[str, float]] = json.loads(Path(__file__).with_name(REFERENCE).read_text())
    return read


@pytest.mark.parametrize("name", NAMES)
def test_no_worse_than_llama_cpp(name: str, reference: dict[str, dict[str, float]]) -> None:
    ratios = {
        f"{kind}/{which}": mean_squared_error(round_trip(x, name, importance), x, importance)
        / reference[name][f"{kind}/{which}"]
        for kind, x in cases().items()
        for which, importance in importances().items()
    }
    worst = max(ratios, key=ratios.__getitem__)
    assert len(ratios) == len(reference[name]) == 32
    assert ratios[worst] <= 1.01, (worst, ratios[worst])
    assert float(np.mean(list(ratios.values()))) <= 1.0


@pytest.mark.parametrize("name", NAMES)
def test_importance_lowers_its_error(name: str) -> None:
    if name == "Q8_0":
        pytest.skip("at 8 bits there is no search that importance could guide")
    x = cases()["normal"]
    importance = importances()["spread"]
    guided = mean_squared_error(round_trip(x, name, importance), x, importance)
    plain = mean_squared_error(round_trip(x, name), x, importance)
    assert guided < 0.97 * plain


@pytest.mark.parametrize("name", NAMES)
def test_scale_of_importance_means_nothing(name: str) -> None:
    x = cases()["normal"][:2]
    importance = importances()["spread"]
    assert importance is not None
    expected = _core.quantize(x, name, importance)
    for factor in (2.0**-60, 2.0**40):
        scaled = importance * np.float32(factor)
        np.testing.assert_array_equal(_core.quantize(x, name, scaled), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_importance_is_none_at_all(name: str, value: float) -> None:
    x = cases()["normal"][:4]
    importance = np.full(N_COLUMNS, value, np.float32)
    got, plain = round_trip(x, name, importance), round_trip(x, name)
    assert mean_squared_error(got, x, None) <= 1.01 * mean_squared_error(plain, x, None)
    if value == 0:
        np.testing.assert_array_equal(got, plain)


@pytest.mark.parametrize("name", NAMES)
def test_columns_without_importance_keep_their_size(name: str) -> None:
    x = cases()["normal"][:4]
    importance = np.zeros(N_COLUMNS, np.float32)
    importance[::64] = 1
    got = round_trip(x, name, importance)
    assert np.isfinite(got).all()
    assert mean_squared_error(got, x, None) < 1.0  # that of zeros
    plain = mean_squared_error(round_trip(x, name), x, importance)
    assert mean_squared_error(got, x, importance) <= plain


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.5, -0.7])
def test_runs_of_one_number_agree_on_their_scale(name: str, value: float) -> None:
    """All candidates meet them, so that nothing but the order decides which scales are found."""
    x = np.full((8, N_COLUMNS), value, np.float32)
    importance = importances()["spread"]
    for weights in (None, importance):
        got = round_trip(x, name, weights)
        assert mean_squared_error(got, x, weights) < 2e-7 * value**2


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_refuses_importance_that_is_none(value: float) -> None:
    importance = np.ones(256, np.float32)
    importance[17] = value
    with pytest.raises(FormatError, match="importance of column 17 is"):
        _core.quantize(np.zeros((1, 256), np.float32), "Q4_K", importance)


def test_refuses_importance_of_other_width() -> None:
    with pytest.raises(ShapeError, match=r"must be \[256\]"):
        _core.quantize(np.zeros((1, 256), np.float32), "Q4_K", np.ones(255, np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_encoded_alone(name: str) -> None:
    # 17 rows of 768: runs of sixteen groups begin anywhere in a row.
    x = np.ascontiguousarray(cases()["heavy"].reshape(-1)[: 17 * 768].reshape(17, 768))
    importance = np.ascontiguousarray(importances()["spread"][:768])  # type: ignore[index]
    for weights in (None, importance):
        together = _core.quantize(x, name, weights)
        alone = [_core.quantize(x[i : i + 1], name, weights, threads=1)[0] for i in range(17)]
        np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("source", ["F32", "F16", "BF16", "Q8_0", "Q4_K"])
def test_requantize(source: str) -> None:
    data = _core.quantize(cases()["heavy"], source)
    importance = importances()["spread"]
    for target in ("F16", "BF16", "F32", *NAMES):
        wide = _core.dequantize(data, source, N_COLUMNS)
        expected = _core.quantize(wide, target, importance)
        got = _core.requantize(data, source, N_COLUMNS, target, importance)
        # Decoders may differ in the sign of zeros, which blocks do not have.
        if target not in ("F16", "BF16", "F32"):
            np.testing.assert_array_equal(got, expected)
        floats = _core.dequantize(got, target, N_COLUMNS)
        np.testing.assert_array_equal(floats, _core.dequantize(expected, target, N_COLUMNS))


HASH = """
import hashlib, sys
sys.path[:0] = sys.argv[1:]
from mla_backend import _core
from quantize.numbers import cases, importances
digest = hashlib.sha256()
for row in _core.formats():
    if row[4]:
        for x in cases().values():
            for importance in importances().values():
                digest.update(_core.quantize(x[:3], row[0], importance).tobytes())
print(digest.hexdigest())
"""


def test_every_isa_gives_the_same_bytes() -> None:
    package = str(Path(_core.__file__).parents[1])
    found = {}
    for isa in _core.available_isas():
        command = [sys.executable, "-c", HASH, package, str(Path(__file__).parents[1])]
        environment = {**os.environ, "MLA_CPU_ISA": isa}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found[isa] = done.stdout.strip()
    assert len(set(found.values())) == 1, found
    assert len(found[isa]) == hashlib.sha256().digest_size * 2


# ---- any numbers ---------------------------------------------------------------------------------
def numbers(limit: float) -> Any:
    elements = st.floats(-limit, limit, width=32)
    return hnp.arrays(np.float32, (2, 256), elements=elements, fill=elements)


@given(
    x=numbers(3e4),
    importance=st.none()
    | hnp.arrays(np.float32, 256, elements=st.floats(0, 2.0**100, width=32), fill=st.just(0.0)),
    name=st.sampled_from(NAMES),
)
@settings(max_examples=300, deadline=None)
def test_any_numbers(x: Floats, importance: Floats | None, name: str) -> None:
    got = round_trip(x, name, importance)
    assert np.isfinite(got).all()
    widest = np.abs(x).max()
    # Nothing is far outside of what came; rounding of tiny scales may add a step of binary16.
    assert np.abs(got).max() <= 1.6 * widest + 1e-4
    if importance is None:
        assert ((got - x) ** 2).sum(dtype=np.float64) <= (x**2).sum(dtype=np.float64) * 1.01 + 1e-6


@given(
    x=hnp.arrays(np.uint32, (1, 256), elements=st.integers(0, 2**32 - 1), fill=st.just(0)),
    name=st.sampled_from(NAMES),
)
@settings(max_examples=200, deadline=None)
def test_any_bits_are_encoded_or_refused(x: Any, name: str) -> None:
    floats = x.view(np.float32)
    largest = np.abs(floats[np.isfinite(floats)]).max(initial=0)
    if np.isfinite(floats).all() and largest < 1e4:
        assert np.isfinite(round_trip(floats, name)).all()
    elif not np.isfinite(floats).all() or largest > 1e9:
        with pytest.raises(FormatError):
            round_trip(floats, name)
