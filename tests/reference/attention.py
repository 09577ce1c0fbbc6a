"""Latent attention, written out: expand every key and value, then softmax over what is visible.

Also the formats of the cache: rows of a plane as bytes, and back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

_Q8_0_ELEMS = 32


class Span(NamedTuple):
    """Tokens of one sequence; see csrc/graph/ops.h."""

    sequence: int
    first_token: int
    n_tokens: int
    first_cell: int
    n_cells: int
    expanded: int


# ---- formats -------------------------------------------------------------------------------------


def row_bytes(format: str, n: int) -> int:
    """Bytes of a cache row of n numbers."""
    if format == "Q8_0":
        return n // _Q8_0_ELEMS * (_Q8_0_ELEMS + 2)
    return n * {"F32": 4, "F16": 2, "BF16": 2}[format]


def encode_rows(x: Array, format: str) -> Bytes:
    """x [S, n] -> uint8 [S, row_bytes]."""
    if format != "Q8_0":
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[format]
        return np.ascontiguousarray(x.astype(dtype)).view(np.uint8)
    blocks = x.astype(np.float64).reshape(len(x), -1, _Q8_0_ELEMS)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    parts = (scale.astype(np.float16).view(np.uint8), codes.astype(np.int8).view(np.uint8))
    return np.concatenate(parts, axis=-1).reshape(len(x), -1)


def decode_rows(rows: Bytes, format: str) -> F64:
    """The reverse: uint8 [S, row_bytes] -> [S, n]."""
    rows = np.ascontiguousarray(rows)
    if format != "Q8_0":
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[format]
        numbers: F64 = rows.view(dtype).astype(np.float64)
        return numbers
    blocks = rows.reshape(len(rows), -1, _Q8_0_ELEMS + 2)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float64)
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(np.float64)
    return (scale * codes).reshape(len(rows), -1)


# ---- attention -----------------------------------------------------------------------------------


def cells_of(span: Span, block_table: I32, block_cells: int) -> npt.NDArray[np.int64]:
    """The cache cells of a span's n_cells positions, in order."""
    counted = span.first_cell + np.arange(span.n_cells)
    blocks = block_table[span.sequence].astype(np.int64)
    cells: npt.NDArray[np.int64] = (
        blocks[counted // block_cells] * block_cells + counted % block_cells
    )
    return cells


def attend(
    q_nope: Array,
    q_rope: Array,
    latent: Array,
    rope: Array,
    k_b: Array,
    v_b: Array,
    scale: float,
) -> F64:
    """The last T of S positions are the queries, each sees itself and what is before it.

    q_nope [T, H, N], q_rope [T, H, R], latent [S, C], rope [S, R], k_b [H, C, N], v_b [H, V, C]
    -> [T, H, V].
    """
    n_tokens, n_heads, _ = q_nope.shape
    out = np.zeros((n_tokens, n_heads, v_b.shape[1]))
    n_before = len(latent) - n_tokens
    for head in range(n_heads):
        keys = latent.astype(np.float64) @ k_b[head].astype(np.float64)  # [S, N]
        values = latent.astype(np.float64) @ v_b[head].astype(np.float64).T  # [S, V]
        score = q_nope[:, head].astype(np.float64) @ keys.T
        score += q_rope[:, head].astype(np.float64) @ rope.astype(np.float64).T
        score *= float(np.float32(scale))
        for token in range(n_tokens):
            seen = score[token, : n_before + 1 + token]
            p = np.exp(seen - seen.max())
            out[token, head] = (p / p.sum()) @ values[: len(seen)]
    return out


def attention(
    q_nope: Array,
    q_rope: Array,
    latent: Array,
    rope: Array,
    k_b: Array,
    v_b: Array,
    spans: list[Span],
    block_table: I32,
    *,
    scale: float,
    block_cells: int,
) -> F64:
    """As the op: latent [cells, C] and rope [cells, R] are whole planes; tokens in no span: 0."""
    out = np.zeros((*q_nope.shape[:2], v_b.shape[1]))
    for span in spans:
        tokens = slice(span.first_token, span.first_token + span.n_tokens)
        cells = cells_of(span, block_table, block_cells)
        out[tokens] = attend(
            q_nope[tokens], q_rope[tokens], latent[cells], rope[cells], k_b, v_b, scale
        )
    return out
