"""Weights in memory: mapped from the file, or read where mapping does not serve.

A mapped file is the normal case: nothing is copied, several processes share the pages, and the
first look at a page brings it in. On network file systems pages come in too slowly one by one, so
the file is read in parallel instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from mla_backend import _core
from mla_backend.gguf import GGUFFile, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Buffer

Progress = Callable[[str, int, int], None]

_PREFETCH_STEP: Final = 64 << 20
#: Elements that tell one tensor from another.
HEAD_ELEMS: Final = 64
_TABLE_ROLES: Final = ("F16", "BF16")


#: A shard's bytes.
_Source = _core.MappedFile | _core.LoadedFile


@dataclass(frozen=True)
class Part:
    """Memory that belongs on given NUMA nodes.

    Attributes:
        label: what it is, for people.
        nodes: where its pages belong, those of ``memory`` from ``begin`` to ``end``; empty:
            anywhere.
    """

    label: str
    nodes: tuple[int, ...]
    memory: Buffer
    begin: int
    end: int


@dataclass(frozen=True)
class PartLoad:
    """How one group of nodes read its part.

    Attributes:
        direct: past the page cache.
    """

    label: str
    n_bytes: int
    seconds: float
    direct: bool

    @property
    def text(self) -> str:
        """``node 0: 9.80 GB in 3.1 s, 3.16 GB/s, past the page cache``."""
        rate = self.n_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0
        way = ", past the page cache" if self.direct else ""
        size = self.n_bytes / 1e9
        return f"{self.label}: {size:.2f} GB in {self.seconds:.1f} s, {rate:.2f} GB/s{way}"


@dataclass(frozen=True)
class LoadOptions:
    """How weights reach memory.

    Attributes:
        mmap: map the file; False reads it into memory of our own.
        mlock: keep mapped pages from being evicted (needs the privilege).
        threads: for reading in parallel.
    """

    mmap: bool = True
    mlock: bool = False
    threads: int = 4


class Weights:
    """The declared weights of one model, bound to memory.

    Attributes:
        mapped_bytes: bytes of mapped shards; the kernel may drop and reread them.
        copied_bytes: anonymous memory: shards that were read, norms converted to float32.
        mapped: False where the file was read instead.
        parts: what lies on which NUMA nodes.
        loaded: how fast each group of nodes read its part.
        notes: one-line statements for the user.
    """

    def __init__(
        self,
        tensors: Mapping[str, _core.Tensor],
        sources: Sequence[_Source],
        *,
        mapped_bytes: int,
        copied_bytes: int,
        parts: Sequence[Part] = (),
        loaded: Sequence[PartLoad] = (),
        heads: Mapping[str, bytes] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """``heads``: of tensors that are kept in parts, what ``head`` gives."""
        self._sources = sources
        self.mapped = mapped_bytes > 0
        self.mapped_bytes = mapped_bytes
        self.copied_bytes = copied_bytes
        self.parts = tuple(parts)
        self.loaded = tuple(loaded)
        self.notes = tuple(notes)
        self._heads = heads or {}
        self._tensors = {name: self._widen(tensor) for name, tensor in tensors.items()}

    @classmethod
    def of_sources(
        cls,
        file: GGUFFile,
        infos: Mapping[str, TensorInfo],
        sources: Sequence[_Source],
        *,
        mapped: bool,
    ) -> Weights:
        """Where whole shards are in memory."""
        shard_bytes = sum(file.shard_bytes)
        return cls(
            tensors_of(infos, sources),
            sources,
            mapped_bytes=shard_bytes if mapped else 0,
            copied_bytes=0 if mapped else shard_bytes,
            parts=[
                Part(f"pages of {path.name}", (), source, 0, source.size)
                for path, source in zip(file.paths, sources, strict=True)
            ],
        )

    def _widen(self, tensor: _core.Tensor) -> _core.Tensor:
        """A norm or bias of 16 bits as float32: their kernels take nothing else."""
        if len(tensor.shape) != 1 or tensor.format not in _TABLE_ROLES:
            return tensor
        bits = tensor.view()
        wide = (
            bits.astype(np.float32)
            if tensor.format == "F16"
            else (bits.astype(np.uint32) << 16).view(np.float32)
        )
        self.copied_bytes += wide.nbytes
        return _core.Tensor(wide, "F32", tensor.shape)

    def __getitem__(self, name: str) -> _core.Tensor:
        return self._tensors[name]

    def head(self, name: str) -> bytes:
        """The first elements of a weight; of quantized ones, the first bytes."""
        tensor = self._tensors[name]
        if name in self._heads and len(tensor.shape) > 1:
            return self._heads[name]
        return np.ascontiguousarray(tensor.view().reshape(-1)[:HEAD_ELEMS]).tobytes()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def prefetch(self, on_progress: Progress | None = None) -> None:
        """Bring the pages of mapped shards in, reporting ("load", bytes done, bytes in all)."""
        report = on_progress or _ignore
        done = 0
        for source in self._sources:
            if not isinstance(source, _core.MappedFile):
                continue
            for begin in range(0, source.size, _PREFETCH_STEP):
                n_bytes = min(_PREFETCH_STEP, source.size - begin)
                report("load", done, self.mapped_bytes)
                source.prefetch(begin, n_bytes)
                done += n_bytes
        if done:
            report("load", done, self.mapped_bytes)

    def check(self) -> None:
        """Raise DeviceError if a mapped file shrank or could not be read since the last call."""
        for source in self._sources:
            source.check()


def load_weights(
    file: GGUFFile,
    infos: Mapping[str, TensorInfo],
    options: LoadOptions,
    on_progress: Progress | None = None,
) -> Weights:
    """Map or read all shards of ``file`` and bind the tensors ``infos``.

    Reading reports ("load", bytes done, bytes in all); mapping takes no time, ``Weights.prefetch``
    does. Raises DeviceError where a file cannot be mapped or read.
    """
    if options.mmap:
        mapped = [_core.MappedFile(str(path), mlock=options.mlock) for path in file.paths]
        return Weights.of_sources(file, infos, mapped, mapped=True)
    report = on_progress or _ignore
    report("load", 0, file.n_bytes)
    sources: list[_Source] = []
    done = 0
    bypass = cannot_hold_twice(file.n_bytes)
    for path, n_bytes in zip(file.paths, file.shard_bytes, strict=True):
        progress = partial(_report_shard, report, done, file.n_bytes)
        sources.append(_core.LoadedFile(str(path), options.threads, progress, bypass))
        done += n_bytes
    report("load", file.n_bytes, file.n_bytes)
    return Weights.of_sources(file, infos, sources, mapped=False)


def tensors_of(
    infos: Mapping[str, TensorInfo], sources: Sequence[_Source]
) -> dict[str, _core.Tensor]:
    """The tensors where they lie in their shards."""
    return {
        name: _core.Tensor(sources[info.shard], info.format, info.shape, offset_bytes=info.offset)
        for name, info in infos.items()
    }


def upload_weights(
    weights: Weights,
    names: Sequence[str],
    workspace: _core.Workspace,
    device_of: Callable[[str], _core.Backend],
    on_progress: Progress | None = None,
) -> tuple[_core.Uploaded, ...]:
    """Bring the weights that lie in the memory of devices there; they stay as the result does.

    Reports ("upload", bytes done, bytes in all). Raises MemoryLimitError.
    """
    report = on_progress or _ignore
    todo = [(weights[name], device_of(name)) for name in names]
    todo = [(tensor, device) for tensor, device in todo if not device.shares_host_memory]
    total = sum(tensor.n_bytes for tensor, _ in todo)
    uploads, done = [], 0
    for tensor, device in todo:
        report("upload", done, total)
        uploads.append(workspace.upload(device, tensor))
        done += tensor.n_bytes
    if todo:
        report("upload", done, total)
    return tuple(uploads)


def cannot_hold_twice(n_bytes: int) -> bool:
    """Whether memory has no room for so many bytes and for the page cache's copy of them."""
    return _core.available_memory_bytes() < 2 * n_bytes


def _report_shard(report: Progress, before: int, total: int, done: int, _: int) -> None:
    report("load", before + done, total)


def _ignore(phase: str, done: int, total: int) -> None:
    """Report to nobody."""


def is_stored_on_network(path: Path) -> bool:
    """Whether ``path`` lies on a network file system, where files are read instead of mapped."""
    return _core.is_network_fs(str(path))
