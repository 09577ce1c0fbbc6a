"""Every operation of the core, callable at once on NumPy arrays.

Each function builds a graph of one operation whose operands are the arrays' own memory, strides
included (zero and negative ones too): nothing is copied on the way in. Results are new arrays.

Floats are float32, float16 or ``ml_dtypes.bfloat16``; integers are int32; weights may also be a
:class:`QuantTensor`. Shapes are outermost first, at most 4 dims. Every function takes

- ``backend``: "cpu", "cuda" or "cuda:1"; what a CUDA device has no kernel for runs on the CPU;
- ``isa``: of the CPU's kernels, one of :func:`available_isas`; None is MLA_CPU_ISA's, or the best;
- ``threads``: how many, the caller included; None is one for each physical core. Results do not
  depend on it.

Products also take ``precision``: "exact" keeps activations in float32 and decodes weights in
registers, "fast" rounds activations to 8 bits or bfloat16 where that pays.

Raised everywhere: ShapeError (extents or strides), FormatError (dtypes), UnsupportedError (a
backend, ISA or option that is not here), DeviceError (a CUDA device that cannot be used),
UsageError (a thread count below 1).
"""

from __future__ import annotations

from typing import Literal

import ml_dtypes
import numpy as np

from mla_backend import _core
from mla_backend.attention_mode import MODES, AttentionMode, HeadDims, expands
from mla_backend.eager import F32, I32, Array, Call, Precision, Weight, Where, available_isas
from mla_backend.errors import ShapeError, UnsupportedError
from mla_backend.formats import by_name
from mla_backend.quant_tensor import QuantTensor, quantize

__all__ = [
    "QuantTensor",
    "Where",
    "add",
    "available_isas",
    "copy",
    "get_rows",
    "matmul",
    "matmul_indexed",
    "mla_attention",
    "quantize",
    "rms_norm",
    "rope",
    "route",
    "softmax",
    "swiglu",
    "swiglu_matmul",
    "top_k",
]

_BLOCK_CELLS = 64  # cells per block of the cache that mla_attention makes


# ---- rows ----------------------------------------------------------------------------------------


def copy(
    x: Array,
    format: str = "F32",
    *,
    backend: str = "cpu",
    isa: str | None = None,
    threads: int | None = None,
) -> Array:
    """Copy x [..] to a new contiguous array, as "F32", "F16" or "BF16" (or I32 from int32)."""
    call = Call("copy", backend, isa, threads)
    name = by_name(format).name
    (out,) = call.run(call.graph.copy(call.operand("x", x), name))
    return out.view(ml_dtypes.bfloat16) if name == "BF16" else out


def add(
    a: Array, b: Array, *, backend: str = "cpu", isa: str | None = None, threads: int | None = None
) -> F32:
    """a + b: float32, same shape."""
    call = Call("add", backend, isa, threads)
    return call.run(call.graph.add(call.operand("a", a), call.operand("b", b)))[0]


def get_rows(
    table: Weight,
    ids: I32,
    *,
    backend: str = "cpu",
    isa: str | None = None,
    threads: int | None = None,
) -> F32:
    """Rows ``ids`` [T] of ``table`` [V, D], decoded: float32 [T, D]."""
    call = Call("get_rows", backend, isa, threads)
    node = call.graph.get_rows(call.operand("table", table), call.operand("ids", ids))
    return call.run(node)[0]


def rms_norm(
    x: Array,
    weight: F32 | None = None,
    eps: float = 1e-6,
    *,
    backend: str = "cpu",
    isa: str | None = None,
    threads: int | None = None,
) -> F32:
    """x / sqrt(mean(x^2) + eps) * weight along the last dim: x [.., D], weight [D] float32."""
    call = Call("rms_norm", backend, isa, threads)
    node = call.graph.rms_norm(call.operand("x", x), call.optional("weight", weight), eps)
    return call.run(node)[0]


def rope(
    x: Array,
    positions: I32,
    frequencies: F32 | None = None,
    *,
    base: float = 10000.0,
    scale: float = 1.0,
    backend: str = "cpu",
    isa: str | None = None,
    threads: int | None = None,
) -> F32:
    """Rotate the pairs (2i, 2i+1) of x [T, H, R] or [T, R] by positions [T] * frequencies [R/2].

    ``frequencies``: radians a position, float32; None is base^(-2i/R). ``scale`` multiplies sine
    and cosine. Angles are exact up to 2^31 radians; positions may be negative.
    """
    call = Call("rope", backend, isa, threads)
    width = np.shape(x)[-1] if np.ndim(x) else 0
    if frequencies is None:
        exponents = np.arange(0, width - width % 2, 2, dtype=np.float64) / max(width, 1)
        frequencies = (base**-exponents).astype(np.float32)
    node = call.graph.rope(
        call.operand("x", x),
        call.operand("positions", positions),
        call.operand("frequencies", frequencies),
        scale,
    )
    return call.run(node)[0]


def softmax(
    x: Array,
    mask: F32 | None = None,
    scale: float = 1.0,
    *,
    backend: str = "cpu",
    isa: str | None = None,
    threads: int | None = None,
) -> F32:
    """softmax(scale * x + mask) along the last dim; ``mask`` broadcasts to x.

    A row that is -inf throughout gives zeros.
    """
    call = Call("softmax", backend, isa, threads)
    node = call.graph.softmax(call.operand("x", x), call.optional("mask", mask), scale)
    return call.run(node)[0]


def swiglu(
    gate: Array,
    up: Array,
    *,
    backend: str = "cpu",
    isa: str | None = None,
    threads: int | None = None,
) -> F32:
    """gate / (1 + e^-gate) * up, same shape."""
    call = Call("swiglu", backend, isa, threads)
    return call.run(call.graph.swiglu(call.operand("gate", gate), call.operand("up", up)))[0]


def route(
    logits: F32,
    bias: F32 | None = None,
    *,
    n_used: int,
    gating: Literal["softmax", "sigmoid"] = "softmax",
    n_groups: int = 1,
    n_groups_used: int = 1,
    group_score: Literal["max", "top2_sum"] = "max",
    normalize: bool = False,
    scale: float = 1.0,
    backend: str = "cpu",
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[I32, F32]:
    """Choose A = n_used of E experts for each token: ids int32 [T, A], weights float32 [T, A].

    logits [T, E]; the score is their softmax or sigmoid, the choice goes by score + bias [E].
    Experts come in ``n_groups`` groups of neighbours; those outside the ``n_groups_used`` best, by
    the best choice in it or the sum of its two best, are never chosen. Weights are the scores
    without bias, divided by their sum with ``normalize``, times ``scale``. Falling order of choice,
    ties to the lower id, NaN last.
    """
    call = Call("route", backend, isa, threads)
    ids, weights = call.graph.route(
        call.operand("logits", logits),
        call.optional("bias", bias),
        n_used=n_used,
        gating=gating,
        n_groups=n_groups,
        n_groups_used=n_groups_used,
        group_score=group_score,
        normalize=normalize,
        scale=scale,
    )
    chosen, shares = call.run(ids, weights)
    return chosen, shares


def top_k(
    logits: F32,
    k: int,
    *,
    backend: str = "cpu",
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[I32, F32, F32]:
    """The k (at most 256) largest of each row of logits [M, V]: ids int32 [M, k], values float32.

    Falling order; ties go to the lower id, NaN is below -inf. Third come totals float32 [M, 1]: the
    sum of e^(logit - values[0]) over the row, NaN where it has a NaN or its largest is infinite.
    """
    call = Call("top_k", backend, isa, threads)
    ids, values, totals = call.run(*call.graph.top_k(call.operand("logits", logits), k))
    return ids, values, totals


# ---- products ------------------------------------------------------------------------------------


def matmul(
    x: Array,
    w: Weight,
    *,
    precision: Precision = "fast",
    transpose_w: bool = False,
    residual: F32 | None = None,
    backend: str = "cpu",
    isa: str | None = None,
    threads: int | None = None,
) -> F32:
    """x [.., M, K] times w [.., N, K] transposed, + residual: float32 [.., M, N].

    Leading dims of w divide those of x; w's index is x's index // ratio. With ``transpose_w``, w is
    [.., K, N].
    """
    call = Call("matmul", backend, isa, threads)
    operands = call.operand("x", x), call.operand("w", w), call.optional("residual", residual)
    return call.run(call.graph.matmul(*operands, precision=precision, transpose_w=transpose_w))[0]


def matmul_indexed(
    x: Array,
    w: Weight,
    ids: I32,
    *,
    weights: F32 | None = None,
    residual: F32 | None = None,
    precision: Precision = "fast",
    backend: str = "cpu",
    isa: str | None = None,
    threads: int | None = None,
) -> F32:
    """Row (t, a) of x [T, A or 1, K] times expert ids[t, a] of w [E, N, K]: float32 [T, A, N].

    With ``weights`` [T, A]: the weighted sum over a, + residual [T, N]: float32 [T, N].
    """
    call = Call("matmul_indexed", backend, isa, threads)
    operands = call.operand("x", x), call.operand("w", w), call.operand("ids", ids)
    extra = call.optional("weights", weights), call.optional("residual", residual)
    return call.run(call.graph.matmul_indexed(*operands, *extra, precision=precision))[0]


def swiglu_matmul(
    x: Array,
    gate: Weight,
    up: Weight,
    *,
    ids: I32 | None = None,
    precision: Precision = "fast",
    backend: str = "cpu",
    isa: str | None = None,
    threads: int | None = None,
) -> F32:
    """swiglu(x gate^T, x up^T): x [.., M, K], gate and up [N, K] -> float32 [.., M, N].

    With ``ids`` [T, A]: x [T, K] and experts gate and up [E, N, K] -> float32 [T, A, N].
    """
    call = Call("swiglu_matmul", backend, isa, threads)
    operands = call.operand("x", x), call.operand("gate", gate), call.operand("up", up)
    node = call.graph.swiglu_matmul(*operands, call.optional("ids", ids), precision=precision)
    return call.run(node)[0]


# ---- attention -----------------------------------------------------------------------------------


def _span(mode: AttentionMode, dims: HeadDims, n_tokens: int, n_cells: int, isa: str) -> I32:
    """All queries as the last positions of sequence 0; see Span in csrc/graph/ops.h."""
    if not 0 < n_tokens <= n_cells:
        raise ShapeError(f"mla_attention: {n_tokens} query tokens of {n_cells} positions")
    if mode not in MODES:
        raise UnsupportedError(f"mla_attention: mode {mode!r}, accepted is {', '.join(MODES)}")
    expanded = expands(dims, mode, n_tokens, n_cells, isa)
    return np.array([[0, 0, n_tokens, 0, n_cells, expanded]], np.int32)


def _cache(call: Call, latent: F32, k_rope: F32, cache_type: str) -> tuple[_core.Node, _core.Node]:
    """Write all positions into a new cache: the nodes of its two planes."""
    stored = by_name(cache_type)
    n_cells = latent.shape[0]
    room = -(-n_cells // _BLOCK_CELLS) * _BLOCK_CELLS
    planes = []
    for format, width in (
        (stored, latent.shape[1]),
        (by_name("F16") if stored.quantized else stored, k_rope.shape[1]),
    ):
        planes.append(call.state("cache", format, (room, width)))
    return call.graph.cache_write(
        planes[0],
        planes[1],
        call.operand("latent", latent),
        call.operand("k_rope", k_rope),
        call.operand("cells", np.arange(n_cells, dtype=np.int32)),
    )


def mla_attention(
    q_nope: F32,
    q_rope: F32,
    latent: F32,
    k_rope: F32,
    k_b: Weight,
    v_b: Weight,
    *,
    scale: float,
    mode: AttentionMode = "auto",
    cache_type: str = "F32",
    k_b_transposed: bool = False,
    precision: Precision = "fast",
    backend: str = "cpu",
    isa: str | None = None,
    threads: int | None = None,
) -> F32:
    """Causal latent attention of one sequence, whose last T of S positions are the queries.

    q_nope [T, H, N], q_rope [T, H, R], latent [S, C], k_rope [S, R]: float32, rope applied; k_b
    [H, C, N] (``k_b_transposed``: [H, N, C]) and v_b [H, V, C]. The latent and k_rope pass through
    a cache of ``cache_type`` (F32, F16, BF16, or Q8_0 with k_rope in F16). ``scale`` multiplies
    q.k. "auto" takes the mode with fewer multiplications. Returns float32 [T, H, V].
    """
    call = Call("mla_attention", backend, isa, threads)
    if [np.ndim(a) for a in (q_nope, latent, k_rope)] != [3, 2, 2] or len(v_b.shape) != 3:
        raise ShapeError("mla_attention: q_nope and v_b must have 3 dims, latent and k_rope 2")
    dims = HeadDims(latent.shape[1], q_nope.shape[2], k_rope.shape[1], v_b.shape[1])
    span = _span(mode, dims, q_nope.shape[0], latent.shape[0], call.isa)
    n_blocks = -(-latent.shape[0] // _BLOCK_CELLS)
    node = call.graph.mla_attention(
        call.operand("q_nope", q_nope),
        call.operand("q_rope", q_rope),
        *_cache(call, latent, k_rope, cache_type),
        call.operand("k_b", k_b),
        call.operand("v_b", v_b),
        call.operand("spans", span),
        call.operand("block_table", np.arange(n_blocks, dtype=np.int32)[None]),
        scale=scale,
        k_b_transposed=k_b_transposed,
        block_cells=_BLOCK_CELLS,
        precision=precision,
    )
    return call.run(node)[0]
