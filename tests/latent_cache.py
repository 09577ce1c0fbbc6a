"""A latent cache in NumPy memory, and operations of the core run on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from cuda.device import cuda_backend, refusals
from mla_backend import _core
from mla_backend.formats import by_name
from mla_backend.ops import Where
from reference.attention import F64, decode_rows, encode_rows, row_bytes

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

#: (latent, rope) formats; the last but one is what a Q8_0 cache is made of.
CACHE_FORMATS = [("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"), ("Q8_0", "F16"), ("F16", "F32")]
_UNIT_BYTES = 4  # both planes begin at whole numbers of the widest element ..
_GAP_BYTES = 4  # .. and unused bytes end a row, so that none may be taken for aligned to vectors


def _whole_units(n_bytes: int) -> int:
    return -(-n_bytes // _UNIT_BYTES) * _UNIT_BYTES


class LatentCache(NamedTuple):
    """Both planes in one buffer, a row per cell, as sessions keep them."""

    memory: Bytes  # [cells, bytes of a row]
    formats: tuple[str, str]  # of the latent and of the rope plane
    widths: tuple[int, int]  # C, R

    def plane(self, i: int) -> Bytes:
        """The bytes of plane 0 (latent) or 1 (rope): a view [cells, row_bytes]."""
        begin = self.begin(i)
        return self.memory[:, begin : begin + row_bytes(self.formats[i], self.widths[i])]

    def begin(self, i: int) -> int:
        """Where in a row of the memory the plane begins."""
        return 0 if i == 0 else _whole_units(row_bytes(self.formats[0], self.widths[0]))

    def tensor(self, i: int) -> _core.Tensor:
        """The same as a tensor of the core."""
        shape = [len(self.memory), self.widths[i]]
        strides = [self.memory.shape[1], by_name(self.formats[i]).block_bytes]
        return _core.Tensor(self.memory, self.formats[i], shape, strides, self.begin(i))

    def fill(self, i: int, cells: Array, rows: Array) -> None:
        """Encode rows [n, width] into those cells."""
        self.plane(i)[cells] = encode_rows(rows, self.formats[i])

    def decoded(self, i: int) -> F64:
        """The numbers of a plane: [cells, width]."""
        return decode_rows(self.plane(i), self.formats[i])


def empty_cache(n_cells: int, formats: tuple[str, str], widths: tuple[int, int]) -> LatentCache:
    """All bytes 0xFF, which is NaN in every float format: what must not be read shows."""
    sizes = [_whole_units(row_bytes(f, n)) for f, n in zip(formats, widths, strict=True)]
    size = sum(sizes) + _GAP_BYTES
    return LatentCache(np.full((n_cells, size), 0xFF, np.uint8), formats, widths)


def constant(g: _core.Graph, name: str, x: Array) -> _core.Node:
    """A contiguous float32 or int32 array as a node."""
    format = {"float32": "F32", "int32": "I32"}[x.dtype.name]
    return g.weight(name, _core.Tensor(x, format, list(x.shape)))


def scattered(g: _core.Graph, name: str, x: Array) -> _core.Node:
    """float32 x as a view with no two elements adjacent: outermost dim innermost, every second."""
    last_first = np.moveaxis(x, 0, -1)
    room = np.full((*last_first.shape, 2), np.nan, np.float32)
    room[..., 1] = last_first
    node = g.slice(constant(g, name, room), x.ndim, 1, 2)
    node = g.reshape(node, list(last_first.shape))
    return g.permute(node, [x.ndim - 1, *range(x.ndim - 1)])


class Runner:
    """Runs a graph of its own on one backend, caches included; the CPU takes what is refused."""

    def __init__(self, where: Where) -> None:
        pool = _core.ThreadPool(where.get("threads") or 1)
        cpu = _core.CpuBackend(pool, where.get("isa") or "")
        self._device = cpu if where.get("backend", "cpu") == "cpu" else cuda_backend()
        self._backends = list(dict.fromkeys((self._device, cpu)))
        self._caches: list[tuple[LatentCache, _core.Tensor]] = []
        self.graph = _core.Graph()

    def planes(self, cache: LatentCache) -> tuple[_core.Node, _core.Node]:
        """The latent and the rope plane: the cache's own memory, or a copy on the device."""
        tensors = [cache.tensor(0), cache.tensor(1)]
        if not self._device.shares_host_memory:
            tensors = self._placed(cache)
        return self.graph.state("latent", tensors[0]), self.graph.state("rope", tensors[1])

    def run(self, inputs: Mapping[str, Array] | None = None) -> Array:
        """The graph's first output, copied. Caches are as the run left them."""
        executor = _core.Executor(self.graph, _core.Workspace(self._backends))
        executor.run(dict(inputs or {}))
        refusals.extend(executor.report()["refusals"])
        for cache, whole in self._caches:
            every = np.arange(len(cache.memory), dtype=np.int32)
            cache.memory[...] = self._device.read_cells(whole, every)
        return np.array(executor.output(0))

    def _placed(self, cache: LatentCache) -> list[_core.Tensor]:
        n_cells, width = cache.memory.shape
        memory = _core.DeviceMemory(self._device, cache.memory.size)
        whole = memory.tensor("I32", [n_cells, width // 4])
        self._device.write_cells(whole, np.arange(n_cells, dtype=np.int32), cache.memory)
        self._caches.append((cache, whole))
        return [
            memory.tensor(
                cache.formats[i],
                [n_cells, cache.widths[i]],
                [width, by_name(cache.formats[i]).block_bytes],
                cache.begin(i),
            )
            for i in range(2)
        ]
