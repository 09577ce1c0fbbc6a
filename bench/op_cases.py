"""The operations of bench_ops.py in the shapes of a V2-Lite model: operands, bytes, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from mla_backend import _core
from mla_backend.formats import by_name
from mla_backend.synth.tensors import Plan
from mla_backend.synth.weights import WeightSource

#: Weights are repeated up to this size, so that no cache holds them all.
_COLD_BYTES = 192 << 20
_BLOCK_CELLS = 64

D_MODEL, D_FF, D_EXPERT, N_EXPERT, N_USED = 2048, 10944, 1408, 64, 6
N_HEAD, NOPE, ROPE, VALUE, LATENT = 16, 128, 64, 128, 512

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One operation in one shape.

    Attributes:
        n_bytes, n_flops: of one execution; activations count as bytes only where there is nothing
            else to read.
        n_copies: executions per run, each with weights of its own.
        build: adds execution number i to a graph and returns its result.
    """

    op: str
    shape: str
    n_bytes: float
    n_flops: float
    n_copies: int
    build: Callable[[_core.Graph, int], _core.Node]


class Operands:
    """Random operands; equal weights are made once."""

    def __init__(self) -> None:
        self._source = WeightSource(0)
        self._draw = np.random.default_rng(0)
        self._weights: dict[tuple[str, tuple[int, ...], int], _core.Tensor] = {}

    def weight(self, format: str, shape: tuple[int, ...], copy: int) -> _core.Tensor:
        """Copy number ``copy`` of a weight, in memory of its own."""
        key = (format, shape, copy)
        if key not in self._weights:
            plan = Plan(f"{shape}.{copy}", format, shape, shape[-1] ** -0.5)
            data = np.concatenate([np.ravel(chunk) for chunk in self._source.chunks(plan)])
            self._weights[key] = _core.Tensor(data, format, list(shape))
        return self._weights[key]

    def forget(self) -> None:
        """Let go of all weights."""
        self._weights.clear()

    def floats(self, *shape: int) -> _core.Tensor:
        """Activations: float32."""
        return _core.Tensor(self._draw.standard_normal(shape, dtype=np.float32), "F32", list(shape))

    def experts(self, n_tokens: int) -> _core.Tensor:
        """Distinct experts for each token: I32 [T, A]."""
        order = np.argsort(self._draw.random((n_tokens, N_EXPERT)), axis=1)
        ids = np.ascontiguousarray(order[:, :N_USED], np.int32)
        return _core.Tensor(ids, "I32", list(ids.shape))


def all_cases(operands: Operands, precision: str) -> Iterator[Case]:
    """Every case; the operands of one are made as it is reached."""
    for format in ("Q4_K", "Q6_K", "Q5_0", "Q8_0", "BF16", "F32"):
        for n_tokens in (1, 8, 512):
            yield _matmul(operands, format, n_tokens, precision)
        operands.forget()
    for n_tokens in (1, 128):
        yield _gate_up(operands, n_tokens, precision)
        yield _down(operands, n_tokens, precision)
        operands.forget()
    yield _attention(operands, 1, 4096, precision)
    yield _attention(operands, 512, 4096, precision)
    yield from _row_ops(operands)


def _copies(n_bytes: float) -> int:
    return max(1, math.ceil(_COLD_BYTES / n_bytes))


def _touched(n_tokens: int) -> float:
    """Experts that random choices of ``n_tokens`` tokens reach."""
    return N_EXPERT * (1 - (1 - N_USED / N_EXPERT) ** n_tokens)


def _matmul(operands: Operands, format: str, n_tokens: int, precision: str) -> Case:
    shape = (D_FF, D_MODEL)
    n_bytes = by_name(format).n_bytes(shape)
    x = operands.floats(n_tokens, D_MODEL)

    def build(graph: _core.Graph, i: int) -> _core.Node:
        w = graph.weight(f"w{i}", operands.weight(format, shape, i))
        return graph.matmul(graph.weight("x", x), w, precision=precision)

    return Case(
        "matmul",
        f"{format} [{D_FF} x {D_MODEL}], {n_tokens} tokens",
        n_bytes,
        2 * n_tokens * math.prod(shape),
        1 if n_tokens > 8 else _copies(n_bytes),
        build,
    )


def _gate_up(operands: Operands, n_tokens: int, precision: str) -> Case:
    shape = (N_EXPERT, D_EXPERT, D_MODEL)
    n_bytes = 2 * by_name("Q4_K").n_bytes(shape[1:]) * _touched(n_tokens)
    x, ids = operands.floats(n_tokens, D_MODEL), operands.experts(n_tokens)

    def build(graph: _core.Graph, i: int) -> _core.Node:
        gate = graph.weight("gate", operands.weight("Q4_K", shape, 2 * i))
        up = graph.weight("up", operands.weight("Q4_K", shape, 2 * i + 1))
        nodes = graph.weight("x", x), gate, up, graph.weight("ids", ids)
        return graph.swiglu_matmul(*nodes, precision=precision)

    return Case(
        "swiglu_matmul",
        f"Q4_K 2 x {N_EXPERT} x [{D_EXPERT} x {D_MODEL}], {N_USED} used, {n_tokens} tokens",
        n_bytes,
        2 * 2 * n_tokens * N_USED * D_EXPERT * D_MODEL,
        2,
        build,
    )


def _down(operands: Operands, n_tokens: int, precision: str) -> Case:
    shape = (N_EXPERT, D_MODEL, D_EXPERT)
    n_bytes = by_name("Q5_0").n_bytes(shape[1:]) * _touched(n_tokens)
    x, ids = operands.floats(n_tokens, N_USED, D_EXPERT), operands.experts(n_tokens)
    shares = operands.floats(n_tokens, N_USED)

    def build(graph: _core.Graph, i: int) -> _core.Node:
        w = graph.weight("w", operands.weight("Q5_0", shape, i))
        nodes = graph.weight("x", x), w, graph.weight("ids", ids), graph.weight("shares", shares)
        return graph.matmul_indexed(*nodes, precision=precision)

    return Case(
        "matmul_indexed",
        f"Q5_0 {N_EXPERT} x [{D_MODEL} x {D_EXPERT}], {N_USED} used, {n_tokens} tokens",
        n_bytes,
        2 * n_tokens * N_USED * D_EXPERT * D_MODEL,
        2,
        build,
    )


def _attention(operands: Operands, n_tokens: int, n_cells: int, precision: str) -> Case:
    expanded = n_tokens > 1
    q_nope = operands.floats(n_tokens, N_HEAD, NOPE)
    q_rope = operands.floats(n_tokens, N_HEAD, ROPE)
    span = np.array([[0, 0, n_tokens, 0, n_cells, expanded]], np.int32)
    blocks = np.arange(n_cells // _BLOCK_CELLS, dtype=np.int32)[None]
    k_b = operands.weight("Q5_0", (N_HEAD, LATENT, NOPE), 0)
    v_b = operands.weight("Q4_K", (N_HEAD, VALUE, LATENT), 0)

    def build(graph: _core.Graph, i: int) -> _core.Node:
        nodes = [graph.weight("q_nope", q_nope), graph.weight("q_rope", q_rope)]
        for width in (LATENT, ROPE):
            cells = np.full((n_cells, width), 0.5, np.float16)
            nodes.append(graph.state("cache", _core.Tensor(cells, "F16", [n_cells, width])))
        nodes += [graph.weight("k_b", k_b), graph.weight("v_b", v_b)]
        nodes += [
            graph.weight(name, _core.Tensor(value, "I32", list(value.shape)))
            for name, value in (("spans", span), ("blocks", blocks))
        ]
        scale = (NOPE + ROPE) ** -0.5
        return graph.mla_attention(*nodes, scale=scale, precision=precision)

    pairs = n_tokens * (n_cells - (n_tokens - 1) / 2)
    per_pair = 2 * (NOPE + ROPE + VALUE) if expanded else 2 * (2 * LATENT + ROPE)
    through = n_cells if expanded else n_tokens
    flops = N_HEAD * (pairs * per_pair + through * 2 * LATENT * (NOPE + VALUE))
    n_bytes = n_cells * 2 * (LATENT + ROPE)
    return Case(
        "mla_attention",
        f"{N_HEAD} heads, {n_tokens} tokens over {n_cells}, F16 cache, "
        f"{'expanded' if expanded else 'absorbed'}",
        n_bytes,
        flops,
        1 if expanded else _copies(n_bytes),
        build,
    )


def _row_ops(operands: Operands) -> Iterator[Case]:
    n_tokens = 512
    x = operands.floats(n_tokens, D_MODEL)
    norm = operands.floats(D_MODEL)
    q = operands.floats(n_tokens, N_HEAD, ROPE)
    wide = operands.floats(n_tokens, D_FF)
    positions = _core.Tensor(np.arange(n_tokens, dtype=np.int32), "I32", [n_tokens])
    exponents = np.arange(0, ROPE, 2) / ROPE
    turns = _core.Tensor((10000.0**-exponents).astype(np.float32), "F32", [ROPE // 2])

    def rms_norm(g: _core.Graph, _: int) -> _core.Node:
        return g.rms_norm(g.weight("x", x), g.weight("norm", norm), 1e-6)

    def rope(g: _core.Graph, _: int) -> _core.Node:
        return g.rope(g.weight("q", q), g.weight("p", positions), g.weight("f", turns), 1.0)

    def softmax(g: _core.Graph, _: int) -> _core.Node:
        return g.softmax(g.weight("x", wide), scale=1.0)

    def swiglu(g: _core.Graph, _: int) -> _core.Node:
        return g.swiglu(g.weight("gate", wide), g.weight("up", wide))

    rows, heads, inner = n_tokens * D_MODEL, n_tokens * N_HEAD * ROPE, n_tokens * D_FF
    yield Case("rms_norm", f"[{n_tokens}, {D_MODEL}]", 8 * rows, 4 * rows, 1, rms_norm)
    yield Case("rope", f"[{n_tokens}, {N_HEAD}, {ROPE}]", 8 * heads, 3 * heads, 1, rope)
    yield Case("softmax", f"[{n_tokens}, {D_FF}]", 8 * inner, 5 * inner, 1, softmax)
    yield Case("swiglu", f"[{n_tokens}, {D_FF}]", 12 * inner, 5 * inner, 1, swiglu)
