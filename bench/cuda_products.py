"""Products alone on a CUDA device: one large matrix by rows of x, and the experts of a layer.

A graph of many equal products is recorded; the difference between a long and a short one tells what
one of them takes, launches included and copies to the host not.

Usage: python -m bench cuda-products
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
from mla_backend import _core, devices
from mla_backend.quant_tensor import quantize

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Inputs = dict[str, Floats | Ints]
Build = Callable[[_core.Graph, int], Inputs]
N, K = 18432, 7168
EXPERTS, EXPERT_N, EXPERT_K, USED = 64, 1408, 2048, 6


def _seconds(backends: list[_core.Backend], build: Build, n_nodes: int) -> float:
    g = _core.Graph()
    inputs = build(g, n_nodes)
    executor = _core.Executor(g, _core.Workspace(backends))
    times = []
    for _ in range(11):
        started = time.perf_counter()
        executor.run(inputs)
        times.append(time.perf_counter() - started)
    return float(np.median(times[4:]))


def _microseconds(backends: list[_core.Backend], build: Build, n_nodes: int) -> float:
    few = n_nodes // 6
    difference = _seconds(backends, build, n_nodes) - _seconds(backends, build, few)
    return difference / (n_nodes - few) * 1e6


def _tiled(format: str, n_rows: int, shape: list[int]) -> _core.Tensor:
    rng = np.random.default_rng(0)
    rows = quantize(rng.normal(size=(64, shape[-1])).astype(np.float32), format).rows
    return _core.Tensor(np.ascontiguousarray(np.tile(rows, (n_rows // 64, 1))), format, shape)


def _plain(w: _core.Tensor, x: Floats, g: _core.Graph, n_nodes: int) -> Inputs:
    xs, ws = g.input("x", "F32", list(x.shape)), g.weight("w", w)
    for _ in range(n_nodes):
        y = g.matmul(xs, ws)
    g.output(y)
    return {"x": x}


def _routed(w: _core.Tensor, x: Floats, ids: Ints, g: _core.Graph, n_nodes: int) -> Inputs:
    xs, chosen = g.input("x", "F32", list(x.shape)), g.input("ids", "I32", list(ids.shape))
    ws = g.weight("w", w)
    for _ in range(n_nodes):
        y = g.matmul_indexed(xs, ws, chosen)
    g.output(y)
    return {"x": x, "ids": ids}


def main() -> None:
    """Print microseconds by number of rows."""
    rng = np.random.default_rng(0)
    backends = [devices.open_cuda(0), _core.CpuBackend(_core.ThreadPool(0), "")]
    for format in ("Q4_K", "Q8_0", "Q6_K", "Q5_0"):
        w = _tiled(format, N, [N, K])
        for n in (1, 2, 4, 8, 16, 64, 512, 4096):
            x = rng.normal(size=(n, K)).astype(np.float32)

            us = _microseconds(backends, partial(_plain, w, x), 12 if n >= 512 else 24)
            rates = f"{w.n_bytes / us / 1e6:.2f} TB/s, {2 * N * K * n / us / 1e6:.0f} TFLOP/s"
            print(f"{format} {N} x {K}, {n} rows: {us:.1f} us, {rates}")
    experts = _tiled("Q4_K", EXPERTS * EXPERT_N, [EXPERTS, EXPERT_N, EXPERT_K])
    for n in (1, 8, 64, 512, 4096):
        x = rng.normal(size=(n, 1, EXPERT_K)).astype(np.float32)
        ids = np.stack([rng.permutation(EXPERTS)[:USED] for _ in range(n)]).astype(np.int32)

        us = _microseconds(backends, partial(_routed, experts, x, ids), 12 if n >= 512 else 24)
        print(f"experts Q4_K, {n} rows: {us:.1f} us")


if __name__ == "__main__":
    main()
