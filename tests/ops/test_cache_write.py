"""Rows into the latent cache; moving and turning rows that are there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from latent_cache import CACHE_FORMATS, LatentCache, Runner, constant, empty_cache, scattered
from mla_backend import _core
from mla_backend.errors import FormatError, ShapeError
from mla_backend.ops import Where
from reference.attention import encode_rows

Array = npt.NDArray[Any]
WIDTHS = (96, 10)  # C, R
N_CELLS = 50


def new_rows(n: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    latent, rope = (rng.normal(size=(n, width)).astype(np.float32) for width in WIDTHS)
    return latent, rope


def write(
    cache: LatentCache, rows: tuple[Array, Array], cells: Array, where: Where, place: Any = constant
) -> None:
    runner = Runner(where)
    g = runner.graph
    operands = [place(g, name, x) for name, x in zip(("c", "r"), rows, strict=True)]
    cells_input = g.input("cells", "I32", [len(cells)])
    written = g.cache_write(*runner.planes(cache), *operands, cells_input)
    g.output(g.copy(written[1], "F32"))
    runner.run({"cells": np.asarray(cells, np.int32)})


def check(
    cache: LatentCache, before: Array, rows: tuple[Array, Array], source: dict[int, int]
) -> None:
    """Cell c holds row source[c]; all other bytes are as before."""
    cells = list(source)
    expected = LatentCache(before.copy(), cache.formats, cache.widths)
    for i in range(2):
        expected.plane(i)[cells] = encode_rows(rows[i][list(source.values())], cache.formats[i])
    if cache.formats[0] == "Q8_0":
        check_q8_0(cache, rows[0], source)
        expected.plane(0)[cells] = cache.plane(0)[cells]
    np.testing.assert_array_equal(cache.memory, expected.memory)


def check_q8_0(cache: LatentCache, latent: Array, source: dict[int, int]) -> None:
    """Scales to the bit; codes within half a step, whichever way a near tie was rounded."""
    cells = list(source)
    blocks = cache.plane(0)[cells].reshape(-1, 34)
    want = encode_rows(latent[list(source.values())], "Q8_0").reshape(-1, 34)
    np.testing.assert_array_equal(blocks[:, :2], want[:, :2])
    x = latent[list(source.values())].reshape(-1, 32).astype(np.float64)
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    codes = blocks[:, 2:].view(np.int8)
    assert np.abs(codes - x / np.where(step > 0, step, 1)).max(initial=0) <= 0.5001


@pytest.mark.parametrize("formats", CACHE_FORMATS)
@pytest.mark.parametrize("place", [constant, scattered])
def test_rows_reach_their_cells(where: Where, formats: tuple[str, str], place: Any) -> None:
    for n_tokens in (1, 7, 40):
        cache = empty_cache(N_CELLS, formats, WIDTHS)
        before = cache.memory.copy()
        rows = new_rows(n_tokens)
        cells = np.random.default_rng(1).permutation(N_CELLS)[:n_tokens].astype(np.int32)
        cells[n_tokens // 2 + 1 :: 5] = -1
        write(cache, rows, cells, where, place)
        source = {int(c): t for t, c in enumerate(cells) if c >= 0}
        check(cache, before, rows, source)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_last_row_for_a_cell_stays(isa: str, threads: int) -> None:
    cache = empty_cache(N_CELLS, ("F32", "F16"), WIDTHS)
    before = cache.memory.copy()
    rows = new_rows(300)
    cells = np.random.default_rng(2).integers(0, 9, 300).astype(np.int32)
    write(cache, rows, cells, {"isa": isa, "threads": threads})
    check(cache, before, rows, {int(c): t for t, c in enumerate(cells)})


def test_extreme_rows(where: Where) -> None:
    latent, rope = new_rows(4)
    latent[0] = 0
    latent[1] = 1e-9  # the scale of its blocks is below the smallest half
    latent[2, ::2] = -65000
    rope[3] = 1e-7
    for formats in CACHE_FORMATS:
        cache = empty_cache(N_CELLS, formats, WIDTHS)
        before = cache.memory.copy()
        write(cache, (latent, rope), np.arange(4, dtype=np.int32), where)
        check(cache, before, (latent, rope), {i: i for i in range(4)})


def test_no_tokens(where: Where) -> None:
    cache = empty_cache(N_CELLS, ("F16", "F16"), WIDTHS)
    before = cache.memory.copy()
    write(cache, new_rows(0), np.zeros(0, np.int32), where)
    np.testing.assert_array_equal(cache.memory, before)


def test_cells_outside_are_refused_before_anything_is_written(where: Where) -> None:
    cache = empty_cache(N_CELLS, ("F16", "F16"), WIDTHS)
    before = cache.memory.copy()
    with pytest.raises(ShapeError, match=r"cells\[2\] is 50, the cache has 50 cells"):
        write(cache, new_rows(3), np.array([0, 1, 50], np.int32), where)
    np.testing.assert_array_equal(cache.memory, before)


# ---- moving and turning --------------------------------------------------------------------------


def turned(x: Array, frequencies: Array, delta: int) -> npt.NDArray[np.float64]:
    pairs = x.astype(np.float64).reshape(len(x), -1, 2)
    angle = delta * frequencies.astype(np.float64)
    z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize(
    ("format", "ulp"), [("F32", 2.0**-23), ("F16", 2.0**-11), ("BF16", 2.0**-8)]
)
@pytest.mark.parametrize("delta", [-1, 4096, -131072])
def test_rotate_rope(isa: str, format: str, ulp: float, delta: int) -> None:
    cache = empty_cache(N_CELLS, ("F16", format), WIDTHS)
    rows = new_rows(N_CELLS)
    for i in range(2):
        cache.fill(i, np.arange(N_CELLS), rows[i])
    before, memory = cache.decoded(1), cache.memory.copy()
    frequencies = (10000.0 ** -np.linspace(0, 0.8, WIDTHS[1] // 2)).astype(np.float32)
    cells = np.array([3, 49, 0, 17], np.int32)
    backend = _core.CpuBackend(_core.ThreadPool(1), isa)
    _core.rotate_rope(backend, cache.tensor(1), cells, frequencies, delta)
    error = np.abs(cache.decoded(1)[cells] - turned(before[cells], frequencies, delta))
    assert error.max() <= 2 * ulp * np.abs(before[cells]).max()
    others = np.setdiff1d(np.arange(N_CELLS), cells)
    np.testing.assert_array_equal(cache.memory[others], memory[others])
    np.testing.assert_array_equal(cache.plane(0), LatentCache(memory, *cache[1:]).plane(0))


def test_rotate_rope_refuses(isa: str) -> None:
    backend = _core.CpuBackend(_core.ThreadPool(1), isa)
    cache = empty_cache(N_CELLS, ("Q8_0", "F16"), WIDTHS)
    frequencies = np.ones(WIDTHS[1] // 2, np.float32)
    one = np.zeros(1, np.int32)
    with pytest.raises(ShapeError, match="cell 50, the cache has 50"):
        _core.rotate_rope(backend, cache.tensor(1), one + 50, frequencies, 1)
    with pytest.raises(ShapeError, match="4 frequencies for rows of 10"):
        _core.rotate_rope(backend, cache.tensor(1), one, frequencies[:4], 1)
    with pytest.raises(FormatError, match="Q8_0, accepted is F32, F16 or BF16"):
        _core.rotate_rope(backend, cache.tensor(0), one, np.ones(48, np.float32), 1)


@pytest.mark.parametrize("formats", CACHE_FORMATS)
def test_copy_cells(formats: tuple[str, str]) -> None:
    cache = empty_cache(N_CELLS, formats, WIDTHS)
    rows = new_rows(N_CELLS)
    for i in range(2):
        cache.fill(i, np.arange(N_CELLS), rows[i])
    want = [cache.plane(i).copy() for i in range(2)]
    source = np.arange(5, 35, dtype=np.int32)
    target = np.arange(2, 32, dtype=np.int32)  # overlaps the source
    for i in range(2):
        want[i][target] = want[i][source]
        _core.copy_cells(cache.tensor(i), source, target)
        np.testing.assert_array_equal(cache.plane(i), want[i])
    with pytest.raises(ShapeError, match="cell -1, the cache has 50"):
        _core.copy_cells(cache.tensor(0), source[:1], np.array([-1], np.int32))
