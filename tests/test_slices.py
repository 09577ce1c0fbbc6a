"""Weights kept in parts give the very bits of weights in one piece."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import _core
from mla_backend.errors import ShapeError, UnsupportedError

Floats = npt.NDArray[np.float32]
FORMATS = ("F32", "BF16", "Q8_0", "Q4_K", "Q6_K")
rng = np.random.default_rng(7)


def encoded(values: Floats, format: str) -> npt.NDArray[np.uint8]:
    """Rows [.., K] -> uint8 [.., row bytes]."""
    rows = values.reshape(-1, values.shape[-1])
    if format == "F32":
        return values.view(np.uint8).reshape(*values.shape[:-1], -1)
    return _core.quantize(rows, format).reshape(*values.shape[:-1], -1)


def sliced(
    data: npt.NDArray[np.uint8], format: str, shape: list[int], axis: int, begins: Sequence[int]
) -> _core.Tensor:
    """``data`` cut along ``axis``, each part in memory of its own that does not begin at 0."""
    memory = []
    for begin, end in itertools.pairwise(begins):
        part = np.take(data, range(begin, end), axis).reshape(-1)
        room = np.full(part.size + 64, 0xAA, np.uint8)
        room[64:] = part
        memory.append((room, 64))
    return _core.Tensor.sliced(format, shape, axis, begins, memory)


def computed(g: _core.Graph, inputs: dict[str, npt.NDArray[np.generic]]) -> Floats:
    """What the graph gives, on three threads."""
    backend = _core.CpuBackend(_core.ThreadPool(3))
    executor = _core.Executor(g, _core.Workspace([backend]))
    executor.run(inputs)
    return np.array(executor.output())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n_tokens", [1, 5, 70])
def test_matmul(format: str, n_tokens: int) -> None:
    n, k = 208, 512
    data = encoded(rng.standard_normal((n, k), np.float32), format)
    x = rng.standard_normal((n_tokens, k), np.float32)
    whole = _core.Tensor(data, format, [n, k])

    def run(weight: _core.Tensor) -> Floats:
        g = _core.Graph()
        g.output(g.matmul(g.input("x", "F32", [n_tokens, k]), g.weight("w", weight)))
        return computed(g, {"x": x})

    expected = run(whole)
    for begins in ([0, 208], [0, 96, 208], [0, 0, 48, 64, 208], [0, 16, 16, 16, 208]):
        assert np.array_equal(run(sliced(data, format, [n, k], 0, begins)), expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n_tokens", [1, 9])
def test_experts(format: str, n_tokens: int) -> None:
    e, f, d, used = 6, 96, 256, 3
    gate, up = (encoded(rng.standard_normal((e, f, d), np.float32), format) for _ in range(2))
    down = encoded(rng.standard_normal((e, d, 512), np.float32), format)[:, :, :]
    x = rng.standard_normal((n_tokens, d), np.float32)
    hidden = rng.standard_normal((n_tokens, used, 512), np.float32)
    ids = np.argsort(rng.random((n_tokens, e)))[:, :used].astype(np.int32)
    weights = rng.random((n_tokens, used), np.float32)

    def run(make: list[_core.Tensor]) -> tuple[Floats, Floats]:
        g = _core.Graph()
        chosen = g.input("ids", "I32", [n_tokens, used])
        xs = g.input("x", "F32", [n_tokens, d])
        g.output(g.swiglu_matmul(xs, g.weight("g", make[0]), g.weight("u", make[1]), chosen))
        h = g.input("h", "F32", [n_tokens, used, 512])
        shares = g.input("s", "F32", [n_tokens, used])
        g.output(g.matmul_indexed(h, g.weight("d", make[2]), chosen, shares))
        backend = _core.CpuBackend(_core.ThreadPool(2))
        executor = _core.Executor(g, _core.Workspace([backend]))
        executor.run({"ids": ids, "x": x, "h": hidden, "s": weights})
        return np.array(executor.output(0)), np.array(executor.output(1))

    data, shapes = (gate, up, down), ([e, f, d], [e, f, d], [e, d, 512])
    whole = [_core.Tensor(w, format, s) for w, s in zip(data, shapes, strict=True)]
    expected = run(whole)
    for cuts in ([0, 48, 96], [0, 16, 16, 96]):
        parts = [
            sliced(w, format, s, 1, [c * s[1] // 96 // 16 * 16 for c in cuts[:-1]] + [s[1]])
            for w, s in zip(data, shapes, strict=True)
        ]
        for got, want in zip(run(parts), expected, strict=True):
            assert np.array_equal(got, want)
    # Gate and up need not be cut alike.
    mixed = [
        sliced(gate, format, shapes[0], 1, [0, 32, 96]),
        sliced(up, format, shapes[1], 1, [0, 64, 96]),
        whole[2],
    ]
    for got, want in zip(run(mixed), expected, strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("format", ["F32", "Q8_0", "Q4_K"])
def test_rows_by_number(format: str) -> None:
    n, k = 40, 256
    data = encoded(rng.standard_normal((n, k), np.float32), format)
    ids = rng.integers(0, n, 17).astype(np.int32)

    def run(table: _core.Tensor) -> Floats:
        g = _core.Graph()
        g.output(g.get_rows(g.weight("t", table), g.input("ids", "I32", [17])))
        return computed(g, {"ids": ids})

    expected = run(_core.Tensor(data, format, [n, k]))
    assert np.array_equal(run(sliced(data, format, [n, k], 0, [0, 7, 7, 33, 40])), expected)


def test_views_of_a_tensor_in_parts() -> None:
    """A legacy kv_b: heads of rows, of which products see a slice each."""
    heads, n, k = 6, 48, 64
    data = rng.standard_normal((heads * n, k), np.float32)
    x = rng.standard_normal((heads, 2, k), np.float32)

    def run(weight: _core.Tensor) -> Floats:
        g = _core.Graph()
        w = g.slice(g.reshape(g.weight("w", weight), [heads, n, k]), 1, 16, n)
        g.output(g.matmul(g.input("x", "F32", [heads, 2, k]), w, precision="exact"))
        return computed(g, {"x": x})

    expected = run(_core.Tensor(data, "F32", [heads * n, k]))
    cut = sliced(encoded(data, "F32"), "F32", [heads * n, k], 0, [0, 2 * n, 5 * n, heads * n])
    assert np.array_equal(run(cut), expected)


def test_what_is_not_read_by_rows_is_refused() -> None:
    data = rng.standard_normal((64, 64), np.float32)
    weight = sliced(encoded(data, "F32"), "F32", [64, 64], 0, [0, 32, 64])
    with pytest.raises(UnsupportedError, match="kept in parts"):
        weight.view()
    for across in (False, True):
        g = _core.Graph()
        w = g.weight("w", weight)
        x = g.input("x", "F32", [64, 64])
        g.output(g.matmul(x, g.permute(w, [1, 0])) if across else g.add(x, w))
        workspace = _core.Workspace([_core.CpuBackend(_core.ThreadPool(1))])
        with pytest.raises(UnsupportedError, match="no kernel"):
            _core.Executor(g, workspace)
        with pytest.raises(UnsupportedError, match="no output"):
            g.output(w)


def test_parts_of_memory_in_one_piece() -> None:
    data = rng.standard_normal((64, 32), np.float32)
    tensor = _core.Tensor(data, "F32", [64, 32]).with_parts([0, 16, 64])
    assert np.array_equal(tensor.view(), data)
    with pytest.raises(ShapeError, match="given parts"):
        tensor.with_parts([0, 64])


@pytest.mark.parametrize(
    ("begins", "n_bytes", "message"),
    [
        ([0, 32], 8192, "rise from 0 to 64"),
        ([0, 40, 32, 64], 8192, "rise from 0 to 64"),
        ([0], 8192, "rise from 0 to 64"),
        ([0, 32, 64], 8190, "part 0 of 8192 bytes"),
    ],
)
def test_parts_that_do_not_fit(begins: list[int], n_bytes: int, message: str) -> None:
    memory = [(np.zeros(n_bytes, np.uint8), 0) for _ in begins[1:]]
    with pytest.raises(ShapeError, match=message):
        _core.Tensor.sliced("F32", [64, 64], 0, begins, memory)
