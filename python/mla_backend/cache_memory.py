"""Where the cells of the latent cache lie: host memory, a file, or the memory of devices.

Layer by layer, a cell is one latent and one roped key, side by side. Each layer lies where it is
computed.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from mla_backend import _core, formats
from mla_backend.config import ModelConfig
from mla_backend.errors import DeviceError, MemoryLimitError, UsageError
from mla_backend.loading import Part
from mla_backend.models.inputs import CachePlanes
from mla_backend.models.rope import rope_frequencies
from mla_backend.numa import MemoryShare

CACHE_TYPES: Final = ("f32", "f16", "bf16", "q8_0")
#: The rope part turns with every shift; it stays in 16 bits where the latent goes to 8.
_ROPE_TYPE: Final = {"f32": "f32", "f16": "f16", "bf16": "bf16", "q8_0": "f16"}

Int32s = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


def row_bytes(config: ModelConfig, cache_type: str) -> tuple[int, int]:
    """Bytes of a cell in one layer: (latent, rope). Raises UsageError for an unknown type."""
    if cache_type not in CACHE_TYPES:
        raise UsageError(f"cache type {cache_type!r}; accepted are {', '.join(CACHE_TYPES)}")
    latent = formats.by_name(cache_type)
    if config.kv_lora_rank % latent.block_elems:
        raise UsageError(
            f"cache type {cache_type!r} needs a latent that is a multiple of "
            f"{latent.block_elems}; this model's is {config.kv_lora_rank}"
        )
    rope = formats.by_name(_ROPE_TYPE[cache_type])
    return latent.n_bytes([config.kv_lora_rank]), rope.n_bytes([config.d_rope])


class _LayerCells(Protocol):
    """The cells of one layer."""

    planes: CachePlanes

    def read(self, cells: Int32s) -> Bytes:
        """Uint8 [n, bytes of a cell], a copy."""

    def write(self, cells: Int32s, data: Bytes) -> None:
        """The reverse."""

    def move(self, source: Int32s, target: Int32s) -> None:
        """Cell target[i] becomes what source[i] was; ranges may overlap."""

    def rotate(
        self, cells: Int32s, frequencies: npt.NDArray[np.float32], delta: int, cpu: _core.CpuBackend
    ) -> None:
        """Turn the roped keys of these cells by ``delta`` positions."""


class CacheMemory:
    """The cells of all layers.

    Attributes:
        layers: the planes of each, as graphs take them.
        n_host_bytes: what of it lies in host memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        cache_type: str,
        begins: Sequence[int],
        backend: _core.CpuBackend,
        devices: Mapping[int, _core.Backend],
        kv_file: Path | None,
        shares: Sequence[MemoryShare],
    ) -> None:
        """What is to lie where.

        Args:
            begins: where the cells of each share begin, and their number at the end. One share,
                and cells lie where they are first touched.
            devices: where layers lie that do not lie in host memory (or in ``kv_file``).
            shares: on which nodes the cells of each lie.
        """
        self._backend = backend
        self._frequencies = rope_frequencies(config)
        widths = row_bytes(config, cache_type)
        n_host = sum(layer not in devices for layer in range(config.n_layer))
        n_cells = begins[-1]
        layer_bytes = n_cells * sum(widths)
        self.n_host_bytes = n_host * layer_bytes
        on_nodes = len(begins) > 2
        page = _core.page_bytes() if on_nodes else 1
        layer_step = -(-layer_bytes // page) * page  # so that no page has cells of two layers
        n_bytes = n_host * layer_step
        host = _pages(n_bytes) if on_nodes else allocate(n_bytes, kv_file)
        #: What lies on which nodes, and why the system refused to see to it.
        self.parts: list[Part] = []
        self.refusals: list[str] = []
        # A file's pages are shared with forked children, which must not write there.
        self._only_pid = None if kv_file is None else os.getpid()
        self._layers: list[_LayerCells] = []
        begin = 0
        for layer in range(config.n_layer):
            device = devices.get(layer)
            if device is None:
                part = host[begin : begin + layer_bytes]
                if on_nodes:
                    bounds = [begin + cell * sum(widths) for cell in begins]
                    self._bind(host, bounds, shares)
                begin += layer_step
                self._layers.append(_HostCells(config, cache_type, part, begins))
            else:
                memory = _core.DeviceMemory(device, layer_bytes)
                self._layers.append(_DeviceCells(config, cache_type, device, memory))
        self.layers = tuple(cells.planes for cells in self._layers)

    def read(self, cells: Int32s) -> Bytes:
        """These cells, copied: uint8 [n_layer, n, bytes of a cell]."""
        return np.stack([layer.read(cells) for layer in self._layers])

    def write(self, cells: Int32s, data: Bytes) -> None:
        """The reverse."""
        for layer, part in zip(self._layers, data, strict=True):
            layer.write(cells, part)

    def copy(self, source: Int32s, target: Int32s) -> None:
        """Cell target[i] becomes what source[i] was, in all layers."""
        for layer in self._layers:
            layer.move(source, target)

    def rotate(self, cells: Int32s, delta: int) -> None:
        """Turn the roped keys of these cells by ``delta`` positions, in all layers."""
        for layer in self._layers:
            layer.rotate(cells, self._frequencies, delta, self._backend)

    def _bind(self, memory: Bytes, bounds: Sequence[int], shares: Sequence[MemoryShare]) -> None:
        """Give bytes [bounds[i], bounds[i + 1]) to the nodes of a share, before they are touched.

        Cells are touched while text is generated, when other memory may have taken the room that
        was planned with: a full node sends them elsewhere, where a binding would end the process.
        Pages that two parts share are the later one's, and are counted with neither.
        """
        page = _core.page_bytes()
        for share, (begin, end) in zip(shares, itertools.pairwise(bounds), strict=True):
            if begin == end or not share.nodes:
                continue
            policy = "interleave" if len(share.nodes) > 1 else "prefer"
            refusal = _core.bind_memory(memory, share.nodes, begin, end - begin, policy)
            if refusal and refusal not in self.refusals:
                self.refusals.append(refusal)
            first, last = -(-begin // page) * page, end // page * page
            if first < last:
                label = f"cache of node {', '.join(map(str, share.nodes))}"
                nodes = (*share.nodes, *share.spare)
                self.parts.append(Part(label, nodes, memory, first, last))

    def check_process(self) -> None:
        """Raise DeviceError in a forked child where the cells are a file of the parent's."""
        if self._only_pid not in (None, os.getpid()):
            raise DeviceError(
                "the cache is a file of the parent process; load the model in the child"
            )


class _HostCells:
    def __init__(
        self, config: ModelConfig, cache_type: str, memory: Bytes, begins: Sequence[int]
    ) -> None:
        latent_bytes, rope_bytes = row_bytes(config, cache_type)
        self._rows = memory.reshape(-1, latent_bytes + rope_bytes)
        n_cells, stride = self._rows.shape
        latent, rope = _plane_formats(cache_type)
        planes = CachePlanes(
            _core.Tensor(
                memory, latent.name, [n_cells, config.kv_lora_rank], [stride, latent.block_bytes]
            ),
            _core.Tensor(
                memory,
                rope.name,
                [n_cells, config.d_rope],
                [stride, rope.block_bytes],
                latent_bytes,
            ),
        )
        if len(begins) > 2:
            planes = CachePlanes(
                planes.latent.with_parts(begins),
                planes.rope.with_parts(begins),
            )
        self.planes = planes

    def read(self, cells: Int32s) -> Bytes:
        return self._rows[cells]

    def write(self, cells: Int32s, data: Bytes) -> None:
        self._rows[cells] = data

    def move(self, source: Int32s, target: Int32s) -> None:
        _core.copy_cells(self.planes.latent, source, target)
        _core.copy_cells(self.planes.rope, source, target)

    def rotate(
        self, cells: Int32s, frequencies: npt.NDArray[np.float32], delta: int, cpu: _core.CpuBackend
    ) -> None:
        _core.rotate_rope(cpu, self.planes.rope, cells, frequencies, delta)


class _DeviceCells:
    """In the memory of a CUDA device, which moves and turns cells itself."""

    def __init__(
        self, config: ModelConfig, cache_type: str, device: Any, memory: _core.DeviceMemory
    ) -> None:
        latent_bytes, rope_bytes = row_bytes(config, cache_type)
        stride = latent_bytes + rope_bytes
        n_cells = memory.n_bytes // stride
        latent, rope = _plane_formats(cache_type)
        self._device = device  # a CudaBackend, whose module may not be here
        self.planes = CachePlanes(
            memory.tensor(
                latent.name, [n_cells, config.kv_lora_rank], [stride, latent.block_bytes]
            ),
            memory.tensor(
                rope.name, [n_cells, config.d_rope], [stride, rope.block_bytes], latent_bytes
            ),
        )
        # Whole cells, as numbers of two bytes: what all types of cells are multiples of.
        self._whole = memory.tensor("F16", [n_cells, stride // 2], [stride, 2])

    def read(self, cells: Int32s) -> Bytes:
        rows: Bytes = self._device.read_cells(self._whole, cells)
        return rows

    def write(self, cells: Int32s, data: Bytes) -> None:
        self._device.write_cells(self._whole, cells, np.ascontiguousarray(data))

    def move(self, source: Int32s, target: Int32s) -> None:
        self._device.copy_cells(self._whole, source, target)

    def rotate(
        self, cells: Int32s, frequencies: npt.NDArray[np.float32], delta: int, cpu: _core.CpuBackend
    ) -> None:
        self._device.rotate_rope(self.planes.rope, cells, frequencies, delta)


def _plane_formats(cache_type: str) -> tuple[formats.Format, formats.Format]:
    return formats.by_name(cache_type), formats.by_name(_ROPE_TYPE[cache_type])


def _pages(n_bytes: int) -> Bytes:
    """Zeroed memory that begins with a page, to be given to nodes."""
    return np.asarray(_core.NodeMemory(n_bytes, []))


def allocate(n_bytes: int, kv_file: Path | None) -> Bytes:
    """Zeroed memory that takes pages only as they are written, or a file's."""
    if kv_file is None:
        try:
            return np.zeros(n_bytes, np.uint8)
        except MemoryError:
            raise MemoryLimitError(f"cannot allocate a cache of {n_bytes} bytes") from None
    return _map_new_file(kv_file, n_bytes)


def _map_new_file(path: Path, n_bytes: int) -> npt.NDArray[np.uint8]:
    """Map a new file of this size, without a name from then on: it goes when its memory does.

    Its space is allocated at once, so that a full disk is an error here and not a signal later.
    """
    try:
        file = path.open("x+b")
    except FileExistsError:
        raise UsageError(f"kv_file {path} exists already; name a file that does not") from None
    except OSError as error:
        raise DeviceError(f"kv_file {path} cannot be created: {error.strerror}") from error
    with file:
        path.unlink()
        try:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
            mapped = mmap.mmap(file.fileno(), n_bytes)
        except OSError as error:
            raise MemoryLimitError(
                f"kv_file {path}: no room for a cache of {n_bytes} bytes: {error.strerror}"
            ) from error
    return np.frombuffer(mapped, np.uint8)
