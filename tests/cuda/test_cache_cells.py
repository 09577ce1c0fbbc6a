"""Cells of a cache in device memory: written by a graph, read, moved, turned."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cuda.device import cuda_backend
from latent_cache import CACHE_FORMATS, LatentCache, constant, empty_cache, scattered
from mla_backend import _core
from mla_backend.errors import DeviceError, FormatError, ShapeError
from mla_backend.formats import by_name

Array = npt.NDArray[Any]
WIDTHS = (96, 10)  # C, R
N_CELLS = 50
EVERY = np.arange(N_CELLS, dtype=np.int32)


class DeviceCache:
    """A cache on the device with the bytes of one on the host."""

    def __init__(self, backend: Any, cache: LatentCache) -> None:
        self.backend = backend
        n_cells, width = cache.memory.shape
        memory = _core.DeviceMemory(backend, n_cells * width)
        self._whole = memory.tensor("I32", [n_cells, width // 4])
        self.planes = [
            memory.tensor(
                cache.formats[i],
                [n_cells, cache.widths[i]],
                [width, by_name(cache.formats[i]).block_bytes],
                cache.begin(i),
            )
            for i in range(2)
        ]
        backend.write_cells(self._whole, EVERY, cache.memory)

    def bytes(self) -> Array:
        return np.asarray(self.backend.read_cells(self._whole, EVERY))


def full_cache(formats: tuple[str, str]) -> LatentCache:
    rng = np.random.default_rng(0)
    cache = empty_cache(N_CELLS, formats, WIDTHS)
    for i, width in enumerate(WIDTHS):
        cache.fill(i, EVERY, rng.normal(size=(N_CELLS, width)).astype(np.float32))
    return cache


def write(backends: list[Any], planes: list[Any], rows: Any, cells: Array, place: Any) -> None:
    g = _core.Graph()
    states = g.state("latent", planes[0]), g.state("rope", planes[1])
    operands = place(g, "c", rows[0]), place(g, "r", rows[1])
    written = g.cache_write(*states, *operands, g.input("cells", "I32", [len(cells)]))
    g.output(g.copy(written[1], "F32"))
    executor = _core.Executor(g, _core.Workspace(backends))
    executor.run({"cells": cells})
    steps = [tuple(step) for step in executor.report()["steps"]]
    assert ("cache_write", backends[0].name) in steps


@pytest.mark.parametrize("formats", CACHE_FORMATS)
@pytest.mark.parametrize("place", [constant, scattered])
def test_writes_are_the_cpus_to_the_bit(formats: tuple[str, str], place: Any) -> None:
    backend, cpu = cuda_backend(), _core.CpuBackend(_core.ThreadPool(1), "")
    rng = np.random.default_rng(1)
    for n_tokens in (0, 1, 7, 40, 300):
        rows = [rng.normal(size=(n_tokens, w)).astype(np.float32) for w in WIDTHS]
        rows[0][1::7] *= 1e-9  # below the smallest half
        rows[0][2::7] *= 60000
        rows[0][3::7] = 0
        # Negative cells are not written; of several rows for one cell the last one stays.
        cells = rng.integers(-5, N_CELLS, n_tokens).astype(np.int32)
        host = empty_cache(N_CELLS, formats, WIDTHS)
        device = DeviceCache(backend, host)
        write([cpu], [host.tensor(0), host.tensor(1)], rows, cells, place)
        write([backend, cpu], device.planes, rows, cells, place)
        np.testing.assert_array_equal(device.bytes(), host.memory)


@pytest.mark.parametrize("formats", CACHE_FORMATS)
def test_read_write_and_move(formats: tuple[str, str]) -> None:
    host = full_cache(formats)
    device = DeviceCache(cuda_backend(), host)
    np.testing.assert_array_equal(device.bytes(), host.memory)
    source = np.arange(5, 35, dtype=np.int32)
    target = np.arange(2, 32, dtype=np.int32)  # overlaps the source
    for i in range(2):
        host.plane(i)[target] = host.plane(i)[source]
        device.backend.copy_cells(device.planes[i], source, target)
    np.testing.assert_array_equal(device.bytes(), host.memory)
    some = np.array([49, 0, 7], np.int32)
    for i in range(2):
        got = device.backend.read_cells(device.planes[i], some)
        np.testing.assert_array_equal(got, host.plane(i)[some])
        host.plane(i)[some] = host.plane(i)[[1, 2, 3]]
        device.backend.write_cells(device.planes[i], some, host.plane(i)[[1, 2, 3]])
    np.testing.assert_array_equal(device.bytes(), host.memory)


@pytest.mark.parametrize(
    ("format", "ulp"), [("F32", 2.0**-23), ("F16", 2.0**-11), ("BF16", 2.0**-8)]
)
@pytest.mark.parametrize("delta", [-1, 4096, -131072])
def test_turn(format: str, ulp: float, delta: int) -> None:
    host = full_cache(("F16", format))
    device = DeviceCache(cuda_backend(), host)
    before = host.decoded(1)
    frequencies = (10000.0 ** -np.linspace(0, 0.8, WIDTHS[1] // 2)).astype(np.float32)
    cells = np.array([3, 49, 0, 17], np.int32)
    device.backend.rotate_rope(device.planes[1], cells, frequencies, delta)
    after = LatentCache(device.bytes(), host.formats, host.widths)
    pairs = before[cells].reshape(len(cells), -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * delta * frequencies.astype(float))
    want = np.stack([turned.real, turned.imag], axis=-1).reshape(len(cells), -1)
    assert np.abs(after.decoded(1)[cells] - want).max() <= 2 * ulp * np.abs(before[cells]).max()
    others = np.setdiff1d(EVERY, cells)
    np.testing.assert_array_equal(after.memory[others], host.memory[others])
    np.testing.assert_array_equal(after.plane(0), host.plane(0))


def test_messages() -> None:
    host = full_cache(("Q8_0", "F16"))
    device = DeviceCache(cuda_backend(), host)
    backend, (latent, rope) = device.backend, device.planes
    zero = np.zeros(1, np.int32)
    frequencies = np.ones(WIDTHS[1] // 2, np.float32)
    with pytest.raises(ShapeError, match="cell -1, the cache has 50"):
        backend.copy_cells(latent, zero, zero - 1)
    with pytest.raises(ShapeError, match="copy_cells: 1 cells to 2"):
        backend.copy_cells(latent, zero, np.arange(2, dtype=np.int32))
    with pytest.raises(ShapeError, match="cell 50, the cache has 50"):
        backend.read_cells(latent, zero + 50)
    with pytest.raises(ShapeError, match="write_cells: 3 bytes for 1 rows of 102"):
        backend.write_cells(latent, zero, np.zeros(3, np.uint8))
    with pytest.raises(ShapeError, match="4 frequencies for rows of 10"):
        backend.rotate_rope(rope, zero, frequencies[:4], 1)
    with pytest.raises(FormatError, match="Q8_0, accepted is F32, F16 or BF16"):
        backend.rotate_rope(latent, zero, np.ones(48, np.float32), 1)
    with pytest.raises(DeviceError, match="does not lie in its memory"):
        backend.read_cells(host.tensor(0), zero)
