"""Weights read straight onto the NUMA nodes that compute with them.

Each group of nodes gets one block of memory, which holds its rows of every matrix, of every expert
too; its own threads read them there from the file. What is not multiplied (norms, biases, the table
of embeddings) is small or looked up by row, and lies on all nodes in turns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mla_backend import _core
from mla_backend.config import ModelConfig
from mla_backend.errors import DeviceError
from mla_backend.gguf import GGUFFile, TensorInfo
from mla_backend.loading import (
    HEAD_ELEMS,
    LoadOptions,
    Part,
    PartLoad,
    Progress,
    Weights,
    cannot_hold_twice,
)
from mla_backend.numa import NodeGroup, NumaPlan
from mla_backend.placement import CPU, Placement
from mla_backend.weights import Role, declare

_SPLIT: Final[tuple[Role, ...]] = ("linear", "experts", "router", "k_b", "v_b", "kv_b")
#: Rows that kernels take at a time: parts begin at multiples, so that no chunk is a ragged one.
_ROWS: Final = 16
#: Where a tensor may begin in a block: a cache line.
_ALIGN_BYTES: Final = 64
#: Readers of a group: more do not speed up a drive.
_MOST_READERS: Final = 8
#: Bytes of what is an element of a view; of other formats a view has bytes.
_ELEM_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Split:
    """How one weight is shared out.

    Attributes:
        axis: along which; the axes before it are repeated in every part.
        begins: [groups + 1] indices of that axis.
    """

    axis: int
    begins: tuple[int, ...]


def split_tensor(
    role: Role, shape: Sequence[int], weights: Sequence[int], config: ModelConfig
) -> Split | None:
    """How a weight of this role is shared out by ``weights``; None: it is in no parts.

    Heads and experts' rows stay whole: no sum is ever split.
    """
    if role == "embedding" and config.tied_embeddings:
        role = "linear"
    if role not in _SPLIT:
        return None
    axis = 1 if role == "experts" else 0
    granule = _ROWS
    if role in ("k_b", "v_b"):
        granule = 1  # a head
    elif role == "kv_b":
        granule = config.d_nope + config.d_value
    begins = _core.split_rows_over_nodes(shape[axis], weights, granule)
    return Split(axis, tuple(begins))


class _Block:
    """Memory that grows on paper until ``allocate``, and then is there."""

    def __init__(self, label: str, nodes: tuple[int, ...], spare: tuple[int, ...] = ()) -> None:
        self.label, self.nodes, self._spare = label, nodes, spare
        self._n_bytes = 0

    def reserve(self, n_bytes: int) -> int:
        """Where the next bytes will lie."""
        offset = self._n_bytes
        self._n_bytes += -(-n_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        return offset

    def allocate(self) -> _core.NodeMemory:
        """Raises MemoryLimitError, DeviceError."""
        # Of memory without CPUs only what the near one cannot hold: binding takes the nearest.
        nodes = (*self.nodes, *self._spare)
        policy = "interleave" if len(self.nodes) > 1 and not self._spare else "bind"
        return _core.NodeMemory(self._n_bytes, nodes, policy)

    def part(self, memory: _core.NodeMemory) -> Part:
        return Part(self.label, (*self.nodes, *self._spare), memory, 0, self._n_bytes)


class _Placer:
    """Finds a place for every weight, then reads them all."""

    def __init__(self, file: GGUFFile, plan: NumaPlan, config: ModelConfig) -> None:
        self._file, self._plan, self._config = file, plan, config
        self._blocks = [
            _Block(f"weights of {group.label}", share.nodes, share.spare)
            for group, share in zip(plan.groups, plan.memory, strict=True)
        ]
        spare = tuple(node for share in plan.memory for node in share.spare)
        self._common = _Block("weights on all nodes", plan.nodes, spare)
        #: For what is computed with elsewhere, where it is not mapped.
        self._elsewhere = _Block("weights for devices", ())
        self._places: dict[str, tuple[Split | _Block, list[int]]] = {}
        self._infos: dict[str, TensorInfo] = {}
        #: Why memory is not bound, where it is not.
        self.refusals: list[str] = []

    def place(self, name: str, info: TensorInfo, role: Role, placement: Placement) -> None:
        """Decide where a weight will lie. Only the CPU reads weights in parts."""
        split = None
        if self._plan.mode == "shard" and placement.is_read_on_cpu_alone(name):
            split = split_tensor(role, info.shape, self._plan.weights, self._config)
        if split is None:
            block = self._common if placement.of(name) == CPU else self._elsewhere
            self._places[name] = block, [block.reserve(info.n_bytes)]
        else:
            unit = info.n_bytes // info.shape[split.axis]
            offsets = [
                block.reserve((end - begin) * unit)
                for block, (begin, end) in zip(
                    self._blocks, itertools.pairwise(split.begins), strict=True
                )
            ]
            self._places[name] = split, offsets
        self._infos[name] = info

    def read(
        self, *, bypass_cache: bool, report: Progress
    ) -> tuple[dict[str, _core.Tensor], list[Part], list[PartLoad]]:
        """All of them at once, every group its own. Returns tensors by name, parts, and rates."""
        memories = [block.allocate() for block in self._blocks]
        whole = {block: block.allocate() for block in (self._common, self._elsewhere)}
        readers = [_Reader(group) for group in self._plan.groups]
        turns = itertools.cycle(readers)
        tensors = {}
        for name, (split, offsets) in self._places.items():
            info = self._infos[name]
            if isinstance(split, _Block):
                memory = whole[split]
                next(turns).add(memory, offsets[0], info)
                tensors[name] = _core.Tensor(
                    memory, info.format, info.shape, offset_bytes=offsets[0]
                )
                continue
            places = list(zip(memories, offsets, strict=True))
            for reader, place, part in zip(
                readers, places, itertools.pairwise(split.begins), strict=True
            ):
                reader.add(*place, info, split.axis, *part)
            tensors[name] = _core.Tensor.sliced(
                info.format, info.shape, split.axis, split.begins, places
            )
        results = _core.read_in_parallel(
            [str(path) for path in self._file.paths],
            [reader.team for reader in readers],
            bypass_cache,
            lambda done: _report_groups(report, readers, done),
        )
        blocks = [*zip(self._blocks, memories, strict=True), *whole.items()]
        blocks = [(block, memory) for block, memory in blocks if memory.n_bytes]
        parts = [block.part(memory) for block, memory in blocks]
        self.refusals = [memory.note for block, memory in blocks if block.nodes and memory.note]
        loads = [
            PartLoad(reader.label, *result) for reader, result in zip(readers, results, strict=True)
        ]
        return tensors, parts, loads


class _Reader:
    """The threads of one group, and what they read."""

    def __init__(self, group: NodeGroup) -> None:
        self.label = group.label
        self.team = _core.ReadTeam(group.cpus, min(group.n_cores, _MOST_READERS))
        self.n_bytes = 0

    def add(
        self,
        memory: _core.NodeMemory,
        offset: int,
        info: TensorInfo,
        axis: int = 0,
        begin: int = 0,
        end: int | None = None,
    ) -> None:
        """Indices of an axis: a run of the file for each index of the axes before it."""
        n_runs = math.prod(info.shape[:axis])
        matrix_bytes = info.n_bytes // n_runs
        unit = matrix_bytes // info.shape[axis]
        n_bytes = matrix_bytes if end is None else (end - begin) * unit
        if n_bytes == 0:
            return
        self.team.add(
            memory,
            offset,
            info.shard,
            info.offset + begin * unit,
            n_bytes,
            n_runs=n_runs,
            file_stride=matrix_bytes,
            out_stride=n_bytes,
        )
        self.n_bytes += n_runs * n_bytes


def load_on_nodes(
    file: GGUFFile,
    infos: Mapping[str, TensorInfo],
    config: ModelConfig,
    plan: NumaPlan,
    placement: Placement,
    options: LoadOptions,
    on_progress: Progress | None = None,
) -> Weights:
    """Read the weights of ``infos`` that lie in host memory onto their nodes.

    The others are mapped, or read as well where ``options`` has it so. The page cache is left alone
    where memory cannot hold the file twice. Reports ("load node 0", bytes done, bytes in all) for
    each of several groups, then the same for all as "load". Raises DeviceError, MemoryLimitError.
    """
    roles = {spec.name: spec.role for spec in declare(config)}
    placer = _Placer(file, plan, config)
    placed = {
        name: info for name, info in infos.items() if not options.mmap or placement.of(name) == CPU
    }
    for name, info in placed.items():
        placer.place(name, info, roles[name], placement)
    heads = _read_heads(file, placed.values())
    bypass = cannot_hold_twice(sum(info.n_bytes for info in placed.values()))
    tensors, parts, loads = placer.read(bypass_cache=bypass, report=on_progress or _ignore)
    # Where the system refuses to bind, the memory says so.
    notes = sorted({f"numa: {note}" for note in placer.refusals})
    sources: list[_core.MappedFile] = []
    if len(placed) < len(infos):
        sources = [_core.MappedFile(str(path)) for path in file.paths]
    for name, info in infos.items():
        if name not in placed:
            tensors[name] = _core.Tensor(
                sources[info.shard], info.format, info.shape, offset_bytes=info.offset
            )
    return Weights(
        tensors,
        sources,
        mapped_bytes=sum(infos[name].n_bytes for name in infos if name not in placed),
        copied_bytes=sum(part.end - part.begin for part in parts),
        parts=parts,
        loaded=loads,
        heads=heads,
        notes=notes,
    )


def _report_groups(report: Progress, readers: Sequence[_Reader], done: Sequence[int]) -> None:
    """What each group has read, then what all have."""
    if len(readers) > 1:
        for reader, n_bytes in zip(readers, done, strict=True):
            report(f"load {reader.label}", n_bytes, reader.n_bytes)
    report("load", sum(done), sum(reader.n_bytes for reader in readers))


def _read_heads(file: GGUFFile, infos: Iterable[TensorInfo]) -> dict[str, bytes]:
    """The first elements of tensors, as ``Weights.head`` gives them, from the file.

    Raises DeviceError.
    """
    heads = {}
    for shard, infos_of_shard in _by_shard(infos).items():
        path = file.paths[shard]
        try:
            with path.open("rb") as source:
                for info in infos_of_shard:
                    n_bytes = min(info.n_bytes, HEAD_ELEMS * _ELEM_BYTES.get(info.format, 1))
                    source.seek(info.offset)
                    heads[info.name] = source.read(n_bytes)
                    if len(heads[info.name]) < n_bytes:
                        raise DeviceError(
                            f"{path}: ends within the tensor {info.name}, at byte {info.offset}"
                        )
        except OSError as error:
            raise DeviceError(f"{path}: reading failed: {error.strerror}") from error
    return heads


def _by_shard(infos: Iterable[TensorInfo]) -> dict[int, list[TensorInfo]]:
    shards: dict[int, list[TensorInfo]] = {}
    for info in infos:
        shards.setdefault(info.shard, []).append(info)
    return shards


def _ignore(phase: str, done: int, total: int) -> None:
    """Report to nobody."""
