"""A program of one token runs as fewer kernels than it has steps, and gives what they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cuda.device import cuda_backend
from mla_backend import _core
from mla_backend.ops import QuantTensor, quantize
from reference.weights import random_weight

Array = npt.NDArray[Any]
Build = Callable[[_core.Graph, str], Sequence[_core.Node]]
CPU = _core.CpuBackend(_core.ThreadPool(1))
WIDTH = 256


def plain(values: Array) -> _core.Tensor:
    format = {"float32": "F32", "int32": "I32"}[values.dtype.name]
    return _core.Tensor(np.ascontiguousarray(values), format, list(values.shape))


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantized(format: str, *shape: int, seed: int = 0) -> _core.Tensor:
    weight, _ = random_weight(format, shape, seed)
    assert isinstance(weight, QuantTensor)
    return _core.Tensor(weight.rows, format, list(shape))


def run(backends: list[Any], build: Build, inputs: dict[str, Array], precision: str) -> list[Array]:
    """Outputs of the third run: the second is recorded, the first is not."""
    graph = _core.Graph()
    outputs = build(graph, precision)
    for node in outputs:
        graph.output(node)
    executor = _core.Executor(graph, _core.Workspace(backends))
    for _ in range(3):
        executor.run(inputs)
    assert not executor.report()["refusals"]
    return [executor.output(i).copy() for i in range(len(outputs))]


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 3e-25, 1e25])
@pytest.mark.parametrize("kept", [False, True])
def test_products_take_the_norm_of_their_row(
    device: str, n_tokens: int, scale: float, kept: bool
) -> None:
    """Packed and plain weights, beside each other; a norm that is an output as well stays."""

    def build(g: _core.Graph, precision: str) -> list[_core.Node]:
        x = g.input("x", "F32", [n_tokens, WIDTH])
        normed = g.rms_norm(x, g.weight("n", plain(1 + floats(WIDTH))), 0.0)
        hidden = g.swiglu_matmul(
            normed,
            g.weight("gate", quantized("Q8_0", 96, WIDTH, seed=1)),
            g.weight("up", quantized("Q8_0", 96, WIDTH, seed=2)),
            precision=precision,
        )
        logits = g.matmul(normed, g.weight("router", plain(floats(7, WIDTH))), precision="exact")
        w = g.weight("w", quantized("Q4_K", 33, WIDTH, seed=3))
        return [
            hidden,
            logits,
            g.matmul(normed, w, hidden_rows(g, hidden), precision),
            g.add(x, x),
            *([normed] if kept else []),
        ]

    def hidden_rows(g: _core.Graph, hidden: _core.Node) -> _core.Node:
        return g.slice(hidden, 1, 5, 38)

    inputs = {"x": floats(n_tokens, WIDTH) * np.float32(scale)}
    got = run([cuda_backend(), CPU], build, inputs, "fast")
    want = run([CPU], build, inputs, "exact")
    for ours, theirs in zip(got, want, strict=True):
        largest = np.abs(theirs).max()
        np.testing.assert_allclose(ours / largest, theirs / largest, atol=1e-3)


@pytest.mark.parametrize("device", ["cuda"])
def test_a_norm_that_is_added_as_well_stays(device: str) -> None:
    """Beside products of nothing, and of one row of weights again and again."""

    def build(g: _core.Graph, precision: str) -> list[_core.Node]:
        normed = g.rms_norm(g.input("x", "F32", [1, WIDTH]))
        square = g.weight("w", quantized("Q4_K", WIDTH, WIDTH))
        nothing = g.slice(square, 0, 0, 0)
        row = g.broadcast(g.weight("row", quantized("Q8_0", 1, WIDTH, seed=4)), [9, WIDTH])
        other = g.rms_norm(g.input("y", "F32", [1, WIDTH]))
        return [
            g.matmul(normed, square, normed, precision),
            g.matmul(other, nothing, precision=precision),
            g.matmul(other, row, precision=precision),
        ]

    inputs = {"x": floats(1, WIDTH), "y": floats(1, WIDTH, seed=9)}
    got = run([cuda_backend(), CPU], build, inputs, "fast")
    want = run([CPU], build, inputs, "exact")
    for ours, theirs in zip(got, want, strict=True):
        largest = np.abs(theirs).max(initial=1e-9)
        np.testing.assert_allclose(ours / largest, theirs / largest, atol=1e-3)


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("width", [2080, 20480, 36864])
def test_wide_rows_take_their_norm(device: str, width: int) -> None:
    """Of several segments, the last not whole; beyond what shared memory holds twice."""

    def build(g: _core.Graph, precision: str) -> list[_core.Node]:
        x = g.input("x", "F32", [1, width])
        normed = g.rms_norm(x, g.weight("n", plain(1 + floats(width))))
        return [g.matmul(normed, g.weight("w", quantized("Q5_0", 5, width)), precision=precision)]

    inputs = {"x": floats(1, width, seed=1)}
    got = run([cuda_backend(), CPU], build, inputs, "fast")[0]
    want = run([CPU], build, inputs, "exact")[0]
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("format", ["F16", "Q8_0"])
def test_a_write_takes_norm_and_rotation(device: str, n_tokens: int, format: str) -> None:
    """Also where rows meet in a cell, of which the last stays, and where one has none."""
    n_cells, latent, rope = 9, 64, 16
    cells = np.array([4, -1, 4, 8, 0], np.int32)[:n_tokens]

    def written(backends: list[Any]) -> Array:
        owner = backends[0]
        sizes = [latent // 32 * 34 if format == "Q8_0" else 2 * latent, 2 * rope]
        planes = [_core.DeviceMemory(owner, n_cells * size) for size in sizes]

        def build(g: _core.Graph, _: str) -> list[_core.Node]:
            kv = g.input("kv", "F32", [n_tokens, latent + rope])
            c = g.rms_norm(g.slice(kv, 1, 0, latent), g.weight("n", plain(floats(latent))), 1e-6)
            turned = g.rope(
                g.slice(kv, 1, latent, latent + rope),
                g.input("positions", "I32", [n_tokens]),
                g.weight("f", plain(np.geomspace(1, 1e-3, rope // 2).astype(np.float32))),
                0.75,
            )
            cache = g.cache_write(
                g.state("latent", planes[0].tensor(format, [n_cells, latent])),
                g.state("rope", planes[1].tensor("F16", [n_cells, rope])),
                c,
                turned,
                g.input("cells", "I32", [n_tokens]),
            )
            return [g.copy(cache[1], "F32")]

        positions = np.arange(n_tokens, dtype=np.int32) * 1000 + 3
        kv = floats(n_tokens, latent + rope, seed=5)
        return run(backends, build, {"kv": kv, "positions": positions, "cells": cells}, "fast")[0]

    np.testing.assert_allclose(written([cuda_backend(), CPU]), written([CPU]), atol=2e-3)


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("n_tokens", [1, 16])
def test_attention_takes_the_rotation_of_its_queries(device: str, n_tokens: int) -> None:
    """Of one token, and of as many as are multiplied with k_b as matrices."""
    heads, nope, rope, latent, value, n_cells = 32, 32, 16, 64, 24, 40
    cache = [
        quantize(floats(*shape, seed=i), "F16")
        for i, shape in enumerate([(n_cells, latent), (n_cells, rope)])
    ]
    k_b = quantize(floats(heads, latent, nope, seed=7) / np.float32(8), "F16")
    v_b = quantize(floats(heads, value, latent, seed=8) / np.float32(8), "F16")

    def build(g: _core.Graph, precision: str) -> list[_core.Node]:
        q = g.input("q", "F32", [n_tokens, heads, nope + rope])
        turned = g.rope(
            g.slice(q, 2, nope, nope + rope),
            g.input("positions", "I32", [n_tokens]),
            g.weight("f", plain(np.geomspace(1, 1e-3, rope // 2).astype(np.float32))),
            0.75,
        )
        held = [
            g.weight(f"w{i}", _core.Tensor(w.rows, "F16", list(w.shape)))
            for i, w in enumerate([*cache, k_b, v_b])
        ]
        return [
            g.mla_attention(
                g.slice(q, 2, 0, nope),
                turned,
                held[0],
                held[1],
                held[2],
                held[3],
                g.input("spans", "I32", [1, 6]),
                g.input("table", "I32", [1, 1]),
                scale=0.2,
                precision=precision,
                contraction="absorbed",
            )
        ]

    inputs = {
        "q": floats(n_tokens, heads, nope + rope, seed=9),
        "positions": np.arange(n_tokens, dtype=np.int32) * 7 + 3,
        "spans": np.array([[0, 0, n_tokens, 0, n_cells, 0]], np.int32),
        "table": np.zeros((1, 1), np.int32),
    }
    got = run([cuda_backend(), CPU], build, inputs, "fast")[0]
    np.testing.assert_allclose(got, run([CPU], build, inputs, "exact")[0], atol=2e-3)
