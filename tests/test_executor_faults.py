"""What executors, graphs and tensors refuse, and what they survive."""

from __future__ import annotations

import gc
import threading

import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import CancelToken, _core
from mla_backend.errors import CancelledError, DeviceError, MemoryLimitError, ShapeError

Floats = npt.NDArray[np.float32]
RNG = np.random.default_rng(8)
X = RNG.standard_normal((4, 32), dtype=np.float32)


@pytest.fixture
def cpu() -> _core.CpuBackend:
    return _core.CpuBackend(_core.ThreadPool(2))


def sum_with(weight: Floats) -> _core.Graph:
    g = _core.Graph()
    w = g.weight("w", _core.Tensor(weight, "F32", list(weight.shape)))
    g.output(g.add(g.input("x", "F32", [4, 32]), w))
    return g


def doubled(shape: list[int]) -> _core.Graph:
    g = _core.Graph()
    x = g.input("x", "F32", shape)
    g.output(g.add(x, x))
    return g


# ---- memory --------------------------------------------------------------------------------------


def test_late_inputs_have_places_of_their_own(cpu: _core.CpuBackend) -> None:
    """An input is there before the first node runs, also where it is declared after it."""
    g = _core.Graph()
    x = g.input("x", "F32", [4, 32])
    wide = g.copy(g.broadcast(x, [64, 4, 32]), "F32")
    thin = g.add(g.reshape(g.slice(wide, 0, 63, 64), [4, 32]), x)
    for _ in range(3):  # the wide value is not needed any more: its place is free
        thin = g.add(thin, x)
    late = g.input("late", "F32", [4, 32])
    g.output(g.add(thin, late))
    executor = _core.Executor(g, _core.Workspace([cpu]))
    executor.run({"x": X, "late": np.full_like(X, 9)})
    np.testing.assert_allclose(executor.output(0), 5 * X + 9, rtol=1e-6)


def test_failed_growth_leaves_the_others_usable(cpu: _core.CpuBackend) -> None:
    workspace = _core.Workspace([cpu])
    executor = _core.Executor(doubled([4, 32]), workspace)
    executor.run({"x": X})
    with pytest.raises(MemoryLimitError, match="cannot allocate"):
        _core.Executor(doubled([1 << 19, 1 << 30]), workspace)
    with pytest.raises(DeviceError, match="used since"):
        executor.output(0)
    executor.run({"x": X})
    np.testing.assert_array_equal(executor.output(0), 2 * X)


def test_copied_weights_are_not_taken_for_later_ones(cpu: _core.CpuBackend) -> None:
    """The same address may hold other weights once the first graph is gone."""
    subset = _core.SubsetBackend(cpu, {"add"})
    workspace = _core.Workspace([subset, cpu])
    memory = np.empty((4, 32), np.float32)
    for value in (1, 2):
        memory[:] = value
        executor = _core.Executor(sum_with(memory), workspace)
        executor.run({"x": X})
        np.testing.assert_array_equal(executor.output(0), X + value)
        del executor
        gc.collect()


@pytest.mark.parametrize("across", [False, True])
def test_copied_weights_keep_their_strides(cpu: _core.CpuBackend, across: bool) -> None:
    """What was planned for is what runs, be the weight transposed, reversed or repeated."""
    w = RNG.standard_normal((37, 6), dtype=np.float32)
    x = RNG.standard_normal((300, 37), dtype=np.float32)
    reversed_rows = _core.Tensor(w, "F32", [37, 6], [-24, 4], 36 * 24)
    one_column = _core.Tensor(w, "F32", [37, 6], [24, 0], 8)
    for tensor, want in ((reversed_rows, w[::-1]), (one_column, w[:, 2:3].repeat(6, 1))):
        g = _core.Graph()
        weight = g.weight("w", tensor)
        weight = weight if across else g.permute(weight, [1, 0])
        node = g.input("x", "F32", [300, 37])
        g.output(g.matmul(node, weight, precision="exact", transpose_w=across))
        subset = _core.SubsetBackend(cpu, {"matmul"})
        executor = _core.Executor(g, _core.Workspace([subset, cpu]))
        executor.run({"x": x})
        np.testing.assert_allclose(executor.output(0), x @ want, atol=1e-4)


def test_outputs_keep_the_weights_they_lie_in(cpu: _core.CpuBackend) -> None:
    g = _core.Graph()
    g.output(
        g.slice(
            g.weight("w", _core.Tensor(np.full(10**6, 7.0, np.float32), "F32", [10**6])), 0, 5, 9
        )
    )
    executor = _core.Executor(g, _core.Workspace([cpu]))
    executor.run({})
    out = executor.output(0)
    del executor, g
    gc.collect()
    np.testing.assert_array_equal(out, [7.0] * 4)


def test_empty_values_alone(cpu: _core.CpuBackend) -> None:
    executor = _core.Executor(doubled([0, 32]), _core.Workspace([cpu]))
    executor.run({"x": np.empty((0, 32), np.float32)})
    assert executor.output(0).shape == (0, 32)


# ---- values that are gone ------------------------------------------------------------------------


def test_outputs_are_of_the_last_run(cpu: _core.CpuBackend) -> None:
    workspace = _core.Workspace([cpu])
    first = _core.Executor(doubled([4, 32]), workspace)
    second = _core.Executor(doubled([4, 32]), workspace)
    with pytest.raises(DeviceError, match="nothing has run yet"):
        first.output(0)
    first.run({"x": X}, wait=False)
    with pytest.raises(DeviceError, match="the last run was not waited for"):
        first.output(0)
    first.run({"x": X})
    second.run({"x": X})
    np.testing.assert_array_equal(second.output(0), 2 * X)
    with pytest.raises(DeviceError, match="used since"):
        first.output(0)


def test_a_cancelled_run_has_no_outputs(cpu: _core.CpuBackend) -> None:
    executor = _core.Executor(doubled([4, 32]), _core.Workspace([cpu]))
    executor.run({"x": X})
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(CancelledError):
        executor.run({"x": X}, cancel)
    with pytest.raises(DeviceError, match="used since"):
        executor.output(0)


def test_one_run_at_a_time() -> None:
    """A second thread gets an error, or its turn; never the first one's memory."""
    workspace = _core.Workspace([_core.CpuBackend(_core.ThreadPool(1))])
    g = _core.Graph()
    y = x = g.input("x", "F32", [256, 512])
    for _ in range(10):
        y = g.rms_norm(g.matmul(y, g.permute(x, [0, 1]), precision="exact"))
        y = g.copy(g.broadcast(g.reshape(y, [256, 256, 1]), [256, 256, 2]), "F32")
        y = g.reshape(y, [256, 512])
    g.output(y)
    x_value = RNG.standard_normal((256, 512), dtype=np.float32)
    executor = _core.Executor(g, workspace)
    executor.run({"x": x_value})
    want = executor.output(0).copy()
    refused = []

    def call() -> None:
        for _ in range(5):
            try:
                executor.run({"x": x_value})
                _core.Executor(doubled([64, 64]), workspace)
            except DeviceError as error:
                refused.append(str(error))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
        assert not caller.is_alive()
    assert all("another executor is running" in text for text in refused)
    executor.run({"x": x_value})
    np.testing.assert_array_equal(executor.output(0), want)


# ---- what is refused -----------------------------------------------------------------------------


def test_a_graph_may_grow_after_planning(cpu: _core.CpuBackend) -> None:
    g = doubled([4, 32])
    executor = _core.Executor(g, _core.Workspace([cpu]))
    g.output(g.input("more", "F32", [4, 32]))
    executor.run({"x": X})
    np.testing.assert_array_equal(executor.output(0), 2 * X)
    with pytest.raises(ShapeError, match="output 1 of 1"):
        executor.output(1)


def test_nodes_of_another_graph() -> None:
    one, other = _core.Graph(), _core.Graph()
    x, y = one.input("x", "F32", [4]), other.input("y", "F32", [4])
    for build in (
        lambda: one.add(x, y),
        lambda: one.output(y),
        lambda: one.slice(y, 0, 0, 2),
        lambda: one.matmul(one.reshape(x, [1, 4]), other.reshape(y, [1, 4])),
    ):
        with pytest.raises(ShapeError, match="node of another graph"):
            build()


@pytest.mark.parametrize("shape", [[1 << 40, 1 << 40], [1 << 62, 4], [0, 1 << 40, 1 << 40]])
def test_sizes_beyond_64_bits(shape: list[int]) -> None:
    with pytest.raises(ShapeError, match=r"more than 2\^50 elements"):
        _core.Graph().input("x", "F32", shape)


def test_results_beyond_64_bits() -> None:
    g = _core.Graph()
    x = g.input("x", "F32", [1, 1])
    many = g.broadcast(x, [1 << 40, 1])
    with pytest.raises(ShapeError, match="elements"):
        g.matmul(many, many)


@pytest.mark.parametrize(
    ("strides", "offset", "message"),
    [
        ([1 << 62, 1 << 62, 1 << 62], 0, "out of range"),
        ([8, 8, 6], 0, "multiples of 4"),
        ([8, 8, 4], 2, "multiples of 4"),
        ([8, 8, -4], 0, "reaches bytes -4"),
        ([16, 8, 8], 0, "reaches bytes 0 to 36 of a buffer of 32"),
    ],
)
def test_tensors_outside_of_their_buffer(strides: list[int], offset: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        _core.Tensor(np.zeros(8, np.float32), "F32", [2, 2, 2], strides, offset)


def test_read_only_memory_is_no_state() -> None:
    memory = np.zeros((8, 32), np.float32)
    memory.flags.writeable = False
    tensor = _core.Tensor(memory, "F32", [8, 32])
    assert not tensor.view().flags.writeable
    with pytest.raises(ShapeError, match="read-only"):
        _core.Graph().state("s", tensor)
    cells = np.zeros(1, np.int32)
    with pytest.raises(ShapeError, match="read-only"):
        _core.copy_cells(tensor, cells, cells)


def test_weights_are_no_cache() -> None:
    g = _core.Graph()
    plane = _core.Tensor(np.zeros((8, 32), np.float32), "F32", [8, 32])
    rows, cells = g.input("r", "F32", [2, 32]), g.input("cells", "I32", [2])
    with pytest.raises(ShapeError, match="kind weight, accepted is state"):
        g.cache_write(g.weight("w", plane), g.state("s", plane), rows, rows, cells)


def attention(g: _core.Graph, heads: int, n_tokens: int) -> _core.Node:
    latent, rope = (
        g.state(name, _core.Tensor(np.zeros((64, n), np.float32), "F32", [64, n]))
        for name, n in (("latent", 32), ("rope", 4))
    )
    return g.mla_attention(
        g.input("q", "F32", [n_tokens, heads, 8]),
        g.input("r", "F32", [n_tokens, heads, 4]),
        latent,
        rope,
        g.input("k", "F32", [heads, 32, 8]),
        g.input("v", "F32", [heads, 8, 32]),
        g.input("spans", "I32", [1, 6]),
        g.input("table", "I32", [1, 1]),
        scale=1.0,
    )


@pytest.mark.parametrize(("heads", "n_tokens"), [(0, 2), (3, 0)])
def test_attention_of_nothing(cpu: _core.CpuBackend, heads: int, n_tokens: int) -> None:
    g = _core.Graph()
    g.output(attention(g, heads, n_tokens))
    executor = _core.Executor(g, _core.Workspace([cpu]))
    executor.run(
        {
            "q": np.empty((n_tokens, heads, 8), np.float32),
            "r": np.empty((n_tokens, heads, 4), np.float32),
            "k": np.empty((heads, 32, 8), np.float32),
            "v": np.empty((heads, 8, 32), np.float32),
            "spans": np.zeros((1, 6), np.int32),
            "table": np.zeros((1, 1), np.int32),
        }
    )
    assert executor.output(0).shape == (n_tokens, heads, 8)


@pytest.mark.parametrize("isa", _core.available_isas())
def test_nan_survives_the_8_bit_cache(isa: str) -> None:
    plane = np.zeros((4, 68), np.uint8)
    rope = np.zeros((4, 32), np.float32)
    g = _core.Graph()
    latent_state = g.state("latent", _core.Tensor(plane, "Q8_0", [4, 64]))
    rope_state = g.state("rope", _core.Tensor(rope, "F32", [4, 32]))
    x = g.input("x", "F32", [2, 64])
    cells = g.weight("cells", _core.Tensor(np.array([0, 2], np.int32), "I32", [2]))
    written = g.cache_write(latent_state, rope_state, x, g.slice(x, 1, 0, 32), cells)
    g.output(written[0])
    rows = RNG.standard_normal((2, 64), dtype=np.float32)
    rows[1, 40] = np.nan
    executor = _core.Executor(g, _core.Workspace([_core.CpuBackend(_core.ThreadPool(1), isa)]))
    executor.run({"x": rows})
    values = _core.dequantize(plane, "Q8_0", 64)
    np.testing.assert_allclose(values[0], rows[0], atol=0.02)
    np.testing.assert_allclose(values[2, :32], rows[1, :32], atol=0.02)
    assert np.isnan(values[2, 32:]).all()
