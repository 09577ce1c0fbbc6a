"""Kernels that exist once for each format of weights: each of them runs, at the smallest size.

With what other tests of the short list launch, this makes all kernels of the module; the script
run.sh shows it. What the operations compute at other sizes is tested with them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda.device import cuda_problem
from latent_cache import Runner, constant
from mla_backend import formats, ops
from ops.test_mla_attention import EXACT_NMSE, FAST_NMSE, encoded, make_case
from reference.errors import nmse

FORMATS = [f.name for f in formats.FORMATS if f.name != "I32"]
K = 256  # a block of the largest format
RNG = np.random.default_rng(11)
ON_DEVICE: ops.Where = {"backend": "cuda", "isa": None, "threads": 2}


@pytest.fixture(autouse=True)
def _device() -> None:
    if problem := cuda_problem():
        pytest.skip(problem)


def product_error(format: str, n_tokens: int, **options: Any) -> float:
    """NMSE of x [T, K] times a weight of this format [32, K], or across one of [K, 256]."""
    across = options.get("transpose_w", False)
    numbers = RNG.standard_normal((K, 256) if across else (32, K), dtype=np.float32)
    weight = ops.quantize(numbers, format)
    w = weight.dequantize() if across else weight.dequantize().T
    x = RNG.standard_normal((n_tokens, K), dtype=np.float32)
    residual = RNG.standard_normal((n_tokens, w.shape[1]), dtype=np.float32)
    got = ops.matmul(x, weight, residual=residual, **options, **ON_DEVICE)
    return nmse(got, x.astype(np.float64) @ w + residual)


@pytest.mark.parametrize("format", FORMATS)
def test_products(format: str) -> None:
    """One row and some, in both precisions; the widths of the kernels for a few; many rows."""
    for n_tokens in (1, 9):
        assert product_error(format, n_tokens, precision="exact") <= EXACT_NMSE
    for n_tokens in (1, 2, 4, 8, 12, 130):
        assert product_error(format, n_tokens, precision="fast") <= FAST_NMSE
    assert product_error(format, 130, precision="fast", transpose_w=True) <= FAST_NMSE


def test_a_residual_that_is_repeated() -> None:
    x, w = (RNG.standard_normal((n, 64), dtype=np.float32) for n in (130, 32))
    row = RNG.standard_normal((1, 32), dtype=np.float32)
    runner = Runner(ON_DEVICE)
    g = runner.graph
    residual = g.broadcast(constant(g, "residual", row), [130, 32])
    g.output(g.matmul(constant(g, "x", x), constant(g, "w", w), residual, "fast"))
    assert nmse(runner.run({}), x.astype(np.float64) @ w.T + row) <= FAST_NMSE


@pytest.mark.parametrize("format", FORMATS)
def test_attention(format: str) -> None:
    """Every format of k_b, along and across, and v_b; operands of both types of 16 bits."""
    for cells in ("F16", "BF16"):
        for across in (False, True):
            for n_tokens in (1, 20):
                for mode in ("absorbed", "expanded"):
                    error = attention_error(format, cells, n_tokens, mode, across, "fast")
                    assert error <= (FAST_NMSE if cells == "F16" else 1e-3), (cells, across, mode)
    for across in (False, True):
        assert attention_error(format, "F16", 2, "expanded", across, "exact") <= EXACT_NMSE


def attention_error(
    format: str, cells: str, n_tokens: int, mode: str, across: bool, precision: str
) -> float:
    # Expanded heads have at most 256 numbers, and blocks of a format must fit into N.
    fits = across or formats.by_name(format).block_elems <= 128
    n_nope = 128 if mode == "expanded" and fits else K
    case = make_case(
        (2, n_nope, 16, K, 24),
        [(n_tokens, n_tokens + 3)],
        formats=(cells, cells),
        scale=0.05,
        n_idle_tokens=1,
        precision=precision,
        k_b_transposed=across,
    ).in_mode(mode)
    own = np.swapaxes(case.k_b, 1, 2) if across else case.k_b
    k_b, k_numbers = encoded(own, format)
    v_b, v_numbers = encoded(case.v_b, format)
    k_numbers = np.swapaxes(k_numbers, 1, 2) if across else k_numbers
    case = replace(case, k_b=k_numbers, v_b=v_numbers)
    return nmse(case.got(ON_DEVICE, k_b, v_b), case.want())
