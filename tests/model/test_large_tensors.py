"""Tensors of more than 2^31 elements: offsets are 64 bits wide everywhere.

They lie in sparse files, so only the rows that are written or read are real.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import _core, ops
from mla_backend.ops import QuantTensor

Bytes = npt.NDArray[np.uint8]
RNG = np.random.default_rng(3)
BLOCK_ELEMS, BLOCK_BYTES = 32, 18  # Q4_0
N_EXPERTS, N, K = 1040, 512, 4096  # 2.18e9 elements


def sparse(path: Path, n_bytes: int) -> Bytes:
    """A file of holes, mapped; skips where the file system has none."""
    with path.open("w+b") as file:
        file.truncate(n_bytes)
        if path.stat().st_blocks * 512 > n_bytes // 2:
            pytest.skip("the file system has no sparse files")
        return np.frombuffer(mmap.mmap(file.fileno(), n_bytes), np.uint8)


@pytest.fixture
def experts(tmp_path: Path) -> tuple[QuantTensor, npt.NDArray[np.float32]]:
    """Q4_0 [E, N, K] in which the first and the last expert are real, and these two decoded."""
    row_bytes = K // BLOCK_ELEMS * BLOCK_BYTES
    rows = sparse(tmp_path / "experts", N_EXPERTS * N * row_bytes).reshape(N_EXPERTS, N, row_bytes)
    values = RNG.standard_normal((2, N, K), dtype=np.float32)
    for expert, value in zip((0, -1), values, strict=True):
        rows[expert] = _core.quantize(value, "Q4_0")
    tensor = QuantTensor(rows, "Q4_0")
    assert np.prod(tensor.shape) > 2**31
    return tensor, np.stack([tensor[0].dequantize(), tensor[N_EXPERTS - 1].dequantize()])


IDS = np.array([[0, N_EXPERTS - 1], [N_EXPERTS - 1, 0], [N_EXPERTS - 1, 0]], np.int32)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_products_by_expert(
    experts: tuple[QuantTensor, npt.NDArray[np.float32]], precision: ops.Precision
) -> None:
    w, real = experts
    x = RNG.standard_normal((3, K), dtype=np.float32)
    wide = x.astype(np.float64) @ real[[0, 1]].astype(np.float64).swapaxes(1, 2)  # [2, 3, N]
    by_token = np.stack([wide[[0, 1], 0], wide[[1, 0], 1], wide[[1, 0], 2]])
    limit = 1e-10 if precision == "exact" else 5e-4
    got = ops.matmul_indexed(x[:, None], w, IDS, precision=precision)
    assert np.square(got - by_token).sum() <= limit * np.square(by_token).sum()
    # silu(y) y, where gate and up are one tensor
    want = by_token * by_token / (1 + np.exp(-by_token))
    got = ops.swiglu_matmul(x, w, w, ids=IDS, precision=precision)
    assert np.square(got - want).sum() <= limit * 4 * np.square(want).sum()


def test_product_with_the_last_of_a_batch(
    experts: tuple[QuantTensor, npt.NDArray[np.float32]],
) -> None:
    """A view that begins beyond 2^31 elements."""
    w, real = experts
    x = RNG.standard_normal((5, K), dtype=np.float32)
    want = x.astype(np.float64) @ real[1].astype(np.float64).T
    got = ops.matmul(x, w[N_EXPERTS - 1], precision="exact")
    assert np.square(got - want).sum() <= 1e-10 * np.square(want).sum()


def test_rows_of_a_large_table(experts: tuple[QuantTensor, npt.NDArray[np.float32]]) -> None:
    w, real = experts
    n_rows = N_EXPERTS * N
    table = QuantTensor(w.rows.reshape(n_rows, -1), "Q4_0")
    ids = np.array([n_rows - 1, 0, n_rows - N, 7, n_rows // 2], np.int32)
    got = ops.get_rows(table, ids)
    np.testing.assert_array_equal(got[:2], [real[1, -1], real[0, 0]])
    np.testing.assert_array_equal(got[2:4], [real[1, 0], real[0, 7]])
    np.testing.assert_array_equal(got[4], 0.0)


def causal_attention(
    q: npt.NDArray[np.float32],
    cells: npt.NDArray[np.float64],
    k_b: npt.NDArray[np.float32],
    v_b: npt.NDArray[np.float32],
    scale: float,
) -> npt.NDArray[np.float64]:
    """One head in float64: q [T, N + R], cells [T, C + R], k_b [C, N], v_b [V, C] -> [T, V]."""
    c = k_b.shape[0]
    keys = np.concatenate([cells[:, :c] @ k_b, cells[:, c:]], axis=1)
    scores = q.astype(np.float64) @ keys.T * scale
    scores += np.triu(np.full(scores.shape, -np.inf), 1)
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    out: npt.NDArray[np.float64] = p / p.sum(axis=1, keepdims=True) @ (cells[:, :c] @ v_b.T)
    return out


@pytest.mark.parametrize("expanded", [0, 1])
def test_attention_at_the_end_of_a_large_cache(tmp_path: Path, expanded: int) -> None:
    """F16 cells of 576 numbers, 2.4e9 in all; the sequence lies in the last two blocks."""
    c, r, block, n_blocks, n_heads, n, v = 512, 64, 64, 65536, 2, 32, 48
    stride = 2 * (c + r)
    n_cells = block * n_blocks
    memory = sparse(tmp_path / "cache", n_cells * stride)
    t = 70
    q = RNG.standard_normal((t, n_heads, n + r), dtype=np.float32)
    latent = RNG.standard_normal((t, c + r), dtype=np.float32).astype(np.float16)
    k_b = (RNG.standard_normal((n_heads, c, n)) / 16).astype(np.float32)
    v_b = (RNG.standard_normal((n_heads, v, c)) / 16).astype(np.float32)

    g = _core.Graph()
    planes = [
        g.state(name, _core.Tensor(memory, "F16", [n_cells, width], [stride, 2], offset))
        for name, width, offset in (("latent", c, 0), ("rope", r, 2 * c))
    ]
    tokens = g.input("latents", "F32", [t, c + r])
    parts = g.slice(tokens, 1, 0, c), g.slice(tokens, 1, c, c + r)
    written = g.cache_write(*planes, *parts, g.input("cells", "I32", [t]))
    queries = g.input("q", "F32", [t, n_heads, n + r])
    g.output(
        g.mla_attention(
            g.slice(queries, 2, 0, n),
            g.slice(queries, 2, n, n + r),
            *written,
            g.weight("k_b", _core.Tensor(k_b, "F32", [n_heads, c, n])),
            g.weight("v_b", _core.Tensor(v_b, "F32", [n_heads, v, c])),
            g.input("spans", "I32", [1, 6]),
            g.input("table", "I32", [1, 2]),
            scale=0.1,
            block_cells=block,
            precision="exact",
        )
    )
    blocks = np.array([[n_blocks - 1, n_blocks - 2]], np.int32)
    cells = (blocks[0][np.arange(t) // block] * block + np.arange(t) % block).astype(np.int32)
    executor = _core.Executor(g, _core.Workspace([_core.CpuBackend(_core.ThreadPool(2))]))
    executor.run(
        {
            "latents": latent.astype(np.float32),
            "cells": cells,
            "q": q,
            "spans": np.array([[0, 0, t, 0, t, expanded]], np.int32),
            "table": blocks,
        }
    )
    wide = latent.astype(np.float64)
    np.testing.assert_array_equal(
        memory[int(cells[-1]) * stride :][:stride].view(np.float16), latent[-1]
    )
    for head in range(n_heads):
        want = causal_attention(q[:, head], wide, k_b[head], v_b[head], scale=0.1)
        got = executor.output(0)[:, head]
        assert np.square(got - want).sum() <= 1e-10 * np.square(want).sum()
