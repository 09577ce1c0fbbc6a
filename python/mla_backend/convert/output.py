"""Files filled in any order: laid out first, written piece by piece, named when complete.

A file grows under a temporary name beside its target; a journal says which pieces are on the disk.
After an interruption the same call goes on from there, and the bytes are the same either way.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mla_backend import _core

from ..errors import MlaError
from ..gguf import Value
from ..gguf.writer import FileLayout, NewTensor, check_disk, lay_out, shard_keys, shard_path
from .journal import Journal
from .pieces import Piece
from .workers import run_all

#: Called with a phase name, the bytes done and the bytes in total.
Progress = Callable[[str, int, int], None]
#: Gives the bytes of a piece.
Maker = Callable[[Piece], npt.NDArray[np.uint8]]

#: How often finished pieces are brought to the disk and recorded.
_JOURNAL_INTERVAL_S: Final = 2.0


@dataclass(frozen=True)
class Shard:
    """One file to be written: its final name, its layout and the tensors it holds."""

    path: Path
    layout: FileLayout
    tensors: tuple[int, ...]

    @property
    def partial(self) -> Path:
        """Where it grows."""
        return self.path.with_name(f".{self.path.name}.part")


@dataclass(frozen=True)
class OutputPlan:
    """All files of one conversion.

    Attributes:
        path: the name that was asked for.
        tensors: of all shards, in order.
        shards: the files.
        pieces: of all tensors, in order.
        identity: what the bytes depend on beside the layout, in words.
    """

    path: Path
    tensors: tuple[NewTensor, ...]
    shards: tuple[Shard, ...]
    pieces: tuple[Piece, ...]
    identity: str

    @property
    def n_bytes(self) -> int:
        """Size of all files together."""
        return sum(shard.layout.n_bytes for shard in self.shards)

    @property
    def paths(self) -> list[Path]:
        """The files by their final names."""
        return [shard.path for shard in self.shards]

    @property
    def journal(self) -> Path:
        """Where the journal lies while the files are unfinished."""
        return self.path.with_name(f".{self.path.name}.journal")

    def formats(self) -> dict[str, tuple[int, int]]:
        """Tensors and their bytes by format, most bytes first."""
        count: Counter[str] = Counter()
        n_bytes: Counter[str] = Counter()
        for tensor in self.tensors:
            count[tensor.format] += 1
            n_bytes[tensor.format] += tensor.n_bytes
        return {format: (count[format], n) for format, n in n_bytes.most_common()}

    def fingerprint(self) -> str:
        """A hash over everything that the bytes of the files depend on."""
        core = Path(_core.__file__).stat()
        facts = [self.identity, str(core.st_size), str(core.st_mtime_ns)]
        digest = sha256("\n".join(facts).encode())
        digest.update(np.array([piece.n_bytes for piece in self.pieces], np.int64).tobytes())
        for shard in self.shards:
            digest.update(shard.layout.header)
        return digest.hexdigest()


def identity_of(files: Sequence[Path]) -> str:
    """Files that the bytes come from, as they are now."""
    stats = [(file.name, file.stat()) for file in files]
    return "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


def plan_output(
    path: Path,
    metadata: Mapping[str, Value | np.generic],
    tensors: Sequence[NewTensor],
    pieces: Sequence[Piece],
    identity: str,
    max_bytes: int | None = None,
) -> OutputPlan:
    """Lay out the files: one, or as many as keep the tensors of each within ``max_bytes``."""
    groups = list(_group(tensors, max_bytes))
    shards = []
    for index, group in enumerate(groups):
        keys: dict[str, Value | np.generic] = dict(metadata) if index == 0 else {}
        keys |= shard_keys(index, len(groups), len(tensors))
        layout = lay_out(keys, [tensors[i] for i in group])
        shards.append(Shard(shard_path(path, index, len(groups)), layout, tuple(group)))
    return OutputPlan(path, tuple(tensors), tuple(shards), tuple(pieces), identity)


def _group(tensors: Sequence[NewTensor], max_bytes: int | None) -> Iterator[list[int]]:
    """Runs of tensors; one that is larger than ``max_bytes`` gets a run of its own."""
    group: list[int] = []
    n_bytes = 0
    for index, tensor in enumerate(tensors):
        if group and max_bytes is not None and n_bytes + tensor.n_bytes > max_bytes:
            yield group
            group, n_bytes = [], 0
        group.append(index)
        n_bytes += tensor.n_bytes
    yield group


def write_output(
    plan: OutputPlan, make: Maker, n_threads: int, on_progress: Progress | None = None
) -> int:
    """Write all files of a plan and return how many bytes an earlier run had already written.

    Args:
        plan: what to write.
        make: called on several threads.
        n_threads: how many.
        on_progress: called with ``"write"``, the bytes done and the bytes in total.

    Raises:
        OSError: a disk is full (found before writing), or a file cannot be read or written. What
            was written stays for the next run, under temporary names.
        MlaError: a piece cannot be made; nothing stays.
        UsageError: another process is writing the same file.
    """
    with Journal(plan.journal, plan.fingerprint()) as journal, ExitStack() as files:
        _begin(plan, journal)
        handles = [files.enter_context(_opened(shard.partial)) for shard in plan.shards]
        resumed = sum(plan.pieces[index].n_bytes for index in journal.done)
        try:
            _fill(plan, make, n_threads, journal, handles, on_progress or (lambda *_: None))
        except MlaError:
            _discard(plan)
            journal.remove()
            raise
        _name(plan, handles)
        journal.remove()
    return resumed


def _begin(plan: OutputPlan, journal: Journal) -> None:
    """Files of full size, as an earlier run left them or with nothing but their headers.

    Nothing stays where the disk is too small for them.
    """
    if journal.done and all(
        shard.partial.exists() and shard.partial.stat().st_size == shard.layout.n_bytes
        for shard in plan.shards
    ):
        return
    _discard(plan)
    journal.restart()
    try:
        check_disk(plan.path, plan.n_bytes)
        for shard in plan.shards:
            with _opened(shard.partial) as handle:
                _reserve(shard, handle)
                _write_at(shard.partial, handle, memoryview(shard.layout.header), 0)
    except OSError:
        _discard(plan)
        journal.remove()
        raise


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _reserve(shard: Shard, handle: int) -> None:
    """Take the space at once, so that no other program can fill the disk meanwhile."""
    with _naming(shard.path):
        if _core.is_network_fs(str(shard.path.absolute().parent)):
            os.ftruncate(handle, shard.layout.n_bytes)  # reserving there would write every block
        else:
            os.posix_fallocate(handle, 0, shard.layout.n_bytes)


def _fill(
    plan: OutputPlan,
    make: Maker,
    n_threads: int,
    journal: Journal,
    handles: list[int],
    on_progress: Progress,
) -> None:
    """Make and write the pieces that the journal lacks."""
    places = {
        tensor: (number, shard.layout.offsets[slot])
        for number, shard in enumerate(plan.shards)
        for slot, tensor in enumerate(shard.tensors)
    }
    total = sum(piece.n_bytes for piece in plan.pieces)
    done = sum(plan.pieces[index].n_bytes for index in journal.done)
    fresh: list[int] = []
    last_s = time.monotonic()

    def work(index: int) -> int:
        piece = plan.pieces[index]
        number, offset = places[piece.tensor]
        data = make(piece)
        _write_at(plan.shards[number].partial, handles[number], data.data, offset + piece.offset)
        return data.nbytes

    def record() -> None:
        for handle, shard in zip(handles, plan.shards, strict=True):
            with _naming(shard.partial):
                os.fdatasync(handle)
        journal.record(fresh)
        fresh.clear()

    def on_done(index: int, n_bytes: int) -> None:
        nonlocal done, last_s
        fresh.append(index)
        done += n_bytes
        on_progress("write", done, total)
        if time.monotonic() - last_s > _JOURNAL_INTERVAL_S:
            record()
            last_s = time.monotonic()

    on_progress("write", done, total)
    try:
        missing = [index for index in range(len(plan.pieces)) if index not in journal.done]
        run_all(missing, work, n_threads, on_done)
    finally:
        record()


def _write_at(path: Path, handle: int, data: memoryview, position: int) -> None:
    view = data.cast("B")
    with _naming(path):
        while view:
            n_bytes = os.pwrite(handle, view, position)
            view, position = view[n_bytes:], position + n_bytes


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors of calls that know only its descriptor."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _discard(plan: OutputPlan) -> None:
    for shard in plan.shards:
        shard.partial.unlink(missing_ok=True)


def _name(plan: OutputPlan, handles: Sequence[int]) -> None:
    """Give the files their names, the first one last: readers begin with it."""
    for handle in handles:
        os.fsync(handle)
    for shard in reversed(plan.shards):
        os.replace(shard.partial, shard.path)
    directory = os.open(plan.path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
