"""The latent cache: one latent and one roped key per position and layer, nothing else.

Memory is one block of cells per layer, allocated once. Cells are handed out in blocks of 64;
a sequence is a list of blocks, so sequences of any length share the memory and a fork shares the
blocks of its prefix. A shared block is copied when one of its sequences has to write into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from mla_backend import _core
from mla_backend.cache_memory import CACHE_TYPES, Bytes, CacheMemory, Int32s, row_bytes
from mla_backend.cache_nodes import FreeBlocks, split_blocks
from mla_backend.config import ModelConfig
from mla_backend.errors import ContextError, ShapeError, UsageError
from mla_backend.models.inputs import CacheLayout
from mla_backend.numa import MemoryShare

__all__ = [
    "BLOCK_CELLS",
    "CACHE_TYPES",
    "CacheSequence",
    "LatentCache",
    "bytes_per_position",
    "cache_bytes",
    "row_bytes",
]

#: Cells of a block: what one step of attention loads, and the unit of sharing.
BLOCK_CELLS: Final = 64


def bytes_per_position(config: ModelConfig, cache_type: str) -> int:
    """Bytes that one position costs over all layers."""
    return config.n_layer * sum(row_bytes(config, cache_type))


def cache_bytes(config: ModelConfig, cache_type: str, n_ctx: int) -> int:
    """Bytes of a cache for ``n_ctx`` positions: whole blocks."""
    return -(-n_ctx // BLOCK_CELLS) * BLOCK_CELLS * bytes_per_position(config, cache_type)


@dataclass(slots=True)
class CacheSequence:
    """Consecutive positions in the cache.

    Attributes:
        row: row of the block table.
        blocks: the blocks that hold it, in order.
        first_cell: cells at the start of the first block that are no part of it any more.
        n_cells: cells attended to.
        first_position: position of the first of them; the next one is that plus ``n_cells``.
    """

    row: int
    blocks: list[int] = field(default_factory=list)
    first_cell: int = 0
    n_cells: int = 0
    first_position: int = 0

    @property
    def next_position(self) -> int:
        """Position of the token that comes next."""
        return self.first_position + self.n_cells


class LatentCache:
    """The cache of one model for all its sequences.

    Attributes:
        n_ctx: positions it was asked for; ``n_cells`` is that rounded up to whole blocks.
        bytes_per_position: over all layers.
        total_bytes: of the memory that was allocated.

    ``kv_file`` names a new file to hold the memory instead; it has no name once it is open.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_ctx: int,
        cache_type: str = "f16",
        *,
        backend: _core.CpuBackend,
        max_sequences: int = 64,
        kv_file: Path | None = None,
        devices: Mapping[int, _core.Backend] | None = None,
        shares: Rows[MemoryShare] | None = None,
    ) -> None:
        """``devices``: see CacheMemory. ``shares``: what each of the backend's nodes keeps.

        None: as it computes.
        """
        if n_ctx < 1:
            raise UsageError(f"n_ctx {n_ctx}; accepted is 1 or more")
        self.cache_type = cache_type
        self.n_ctx = n_ctx
        self.n_blocks = -(-n_ctx // BLOCK_CELLS)
        self.n_cells = self.n_blocks * BLOCK_CELLS
        self.max_sequences = max_sequences
        self.bytes_per_position = bytes_per_position(config, cache_type)
        self.total_bytes = cache_bytes(config, cache_type, n_ctx)
        self._cell_bytes = sum(row_bytes(config, cache_type))  # in one layer
        self._config = config
        shares = _shares(backend, shares) if kv_file is None else [MemoryShare((), 1)]
        weights = [share.weight for share in shares]
        begins = split_blocks(self.n_blocks, weights, BLOCK_CELLS * self._cell_bytes)
        self.memory = CacheMemory(
            config,
            cache_type,
            [begin * BLOCK_CELLS for begin in begins],
            backend,
            devices or {},
            kv_file,
            shares,
        )
        self.layout = CacheLayout(self.memory.layers, BLOCK_CELLS, self.n_blocks)
        self._users = [0] * self.n_blocks
        self._free = FreeBlocks(begins)
        self._free_rows = list(range(max_sequences - 1, -1, -1))
        #: Blocks of each sequence, as attention reads it: I32 [sequences, blocks].
        self.block_table: Int32s = np.zeros((max_sequences, self.n_blocks), np.int32)

    # ---- sequences ------------------------------------------------------------------------------

    @property
    def n_free_cells(self) -> int:
        """Cells in blocks that no sequence uses."""
        return len(self._free) * BLOCK_CELLS

    def add(self) -> CacheSequence:
        """A new, empty sequence. Raises ContextError when there are ``max_sequences``."""
        if not self._free_rows:
            raise ContextError(f"the cache holds its {self.max_sequences} sequences already")
        return CacheSequence(self._free_rows.pop())

    def fork(self, parent: CacheSequence) -> CacheSequence:
        """A sequence with the same past. Nothing is copied until one of the two goes on."""
        child = self.add()
        n_blocks = -(-(parent.first_cell + parent.n_cells) // BLOCK_CELLS)
        child.blocks = parent.blocks[:n_blocks]  # without blocks that are only reserved
        child.first_cell = parent.first_cell
        child.n_cells = parent.n_cells
        child.first_position = parent.first_position
        for block in child.blocks:
            self._users[block] += 1
        self._write_table(child)
        return child

    def remove(self, sequence: CacheSequence) -> None:
        """Forget a sequence; it must not be used again."""
        self.truncate(sequence, 0)
        self._free_rows.append(sequence.row)

    def truncate(self, sequence: CacheSequence, n_cells: int) -> None:
        """Keep the first ``n_cells`` positions."""
        if not 0 <= n_cells <= sequence.n_cells:
            raise ShapeError(f"truncate to {n_cells} of {sequence.n_cells} positions")
        sequence.n_cells = n_cells
        n_blocks = -(-(sequence.first_cell + n_cells) // BLOCK_CELLS) if n_cells else 0
        for block in sequence.blocks[n_blocks:]:
            self._release(block)
        del sequence.blocks[n_blocks:]
        if not n_cells:
            sequence.first_cell = 0

    def keep_last(self, sequence: CacheSequence, n_cells: int) -> None:
        """Drop all but the last ``n_cells`` positions, which keep their numbers (see ``shift``)."""
        if not 0 <= n_cells <= sequence.n_cells:
            raise ShapeError(f"keep the last {n_cells} of {sequence.n_cells} positions")
        n_dropped = sequence.n_cells - n_cells
        sequence.first_position += n_dropped
        if not n_cells:
            self.truncate(sequence, 0)
            return
        sequence.n_cells = n_cells
        skip, sequence.first_cell = divmod(sequence.first_cell + n_dropped, BLOCK_CELLS)
        for block in sequence.blocks[:skip]:
            self._release(block)
        del sequence.blocks[:skip]
        self._write_table(sequence)

    def shift(self, sequence: CacheSequence, delta: int) -> None:
        """Add ``delta`` to all positions: only the roped keys turn, latents carry no position.

        Raises ShapeError where a position would become negative, ContextError where shared blocks
        must be copied and none is free.
        """
        if sequence.first_position + delta < 0:
            raise ShapeError(f"shift by {delta} from position {sequence.first_position}")
        if delta and sequence.n_cells:
            self.memory.check_process()
            self._own(sequence, range(len(sequence.blocks)))
            self.memory.rotate(self.cells(sequence, 0, sequence.n_cells), delta)
        sequence.first_position += delta

    def drop(self, sequence: CacheSequence, begin: int, end: int) -> None:
        """Remove positions [begin, end), counted from the first; later ones move up and turn.

        What follows was computed with the dropped text in view: this forgets the text itself, not
        its traces. Raises ShapeError, and ContextError as ``shift`` does.
        """
        if not 0 <= begin <= end <= sequence.n_cells:
            raise ShapeError(f"drop [{begin}, {end}) of {sequence.n_cells} positions")
        moved = sequence.n_cells - end
        if begin < end and moved:
            self.memory.check_process()
            first = (sequence.first_cell + begin) // BLOCK_CELLS
            self._own(sequence, range(first, len(sequence.blocks)))
            source = self.cells(sequence, end, moved)
            target = self.cells(sequence, begin, moved)
            self.memory.copy(source, target)
            self.memory.rotate(target, begin - end)
        self.truncate(sequence, begin + moved)

    # ---- writing --------------------------------------------------------------------------------

    def reserve(self, sequence: CacheSequence, n_tokens: int) -> Int32s:
        """Cells for the next ``n_tokens`` positions, I32 [n_tokens], to be written by a run.

        ``commit`` makes them part of the sequence. Raises ContextError, and changes nothing, where
        the cache has no room.
        """
        self.memory.check_process()
        used = sequence.first_cell + sequence.n_cells
        n_blocks = -(-(used + n_tokens) // BLOCK_CELLS)
        n_new = max(n_blocks - len(sequence.blocks), 0)
        tail = used // BLOCK_CELLS  # the block the first new cell falls into
        shared = tail < len(sequence.blocks) and self._users[sequence.blocks[tail]] > 1
        if n_new + shared > len(self._free):
            raise ContextError(
                f"{n_tokens} more positions do not fit: the cache holds {self.n_cells}, "
                f"{self.n_free_cells} are free"
            )
        if shared:
            self._own(sequence, [tail])
        if n_new:
            for _ in range(n_new):
                sequence.blocks.append(self._take(sequence, len(sequence.blocks)))
            self._write_table(sequence)
        return self.cells(sequence, sequence.n_cells, n_tokens)

    def release(self, sequence: CacheSequence) -> None:
        """Give back what ``reserve`` took and no ``commit`` counted."""
        self.truncate(sequence, sequence.n_cells)

    def fits(self, sequence: CacheSequence, n_cells: int) -> bool:
        """Whether ``n_cells`` positions find room in place of what the sequence holds."""
        own = sum(self._users[block] == 1 for block in sequence.blocks)
        return -(-n_cells // BLOCK_CELLS) <= len(self._free) + own

    def commit(self, sequence: CacheSequence, n_tokens: int) -> None:
        """Count ``n_tokens`` reserved cells, now written, as part of the sequence."""
        sequence.n_cells += n_tokens

    def cells(self, sequence: CacheSequence, begin: int, n_cells: int) -> Int32s:
        """Where positions [begin, begin + n_cells) of a sequence lie, I32 [n_cells]."""
        first = begin + sequence.first_cell
        blocks = self.block_table[sequence.row]
        if n_cells == 1:  # while generating, every time: without the overhead of arrays
            block, offset = divmod(first, BLOCK_CELLS)
            return np.array([blocks[block] * BLOCK_CELLS + offset], np.int32)
        index = np.arange(first, first + n_cells, dtype=np.int32)
        cells: Int32s = blocks[index // BLOCK_CELLS] * BLOCK_CELLS + index % BLOCK_CELLS
        return cells

    # ---- saving ---------------------------------------------------------------------------------

    def read(self, sequence: CacheSequence) -> Bytes:
        """The cells of a sequence, copied: uint8 [n_layer, n_cells, bytes of a cell]."""
        return self.memory.read(self.cells(sequence, 0, sequence.n_cells))

    def write(self, sequence: CacheSequence, data: Bytes) -> None:
        """Append what ``read`` gave, in any shape, for the same model and cache type."""
        cells = data.reshape(self._config.n_layer, -1, self._cell_bytes)
        n_tokens = cells.shape[1]
        self.memory.write(self.reserve(sequence, n_tokens), cells)
        self.commit(sequence, n_tokens)

    # ---- blocks ---------------------------------------------------------------------------------

    def _take(self, sequence: CacheSequence, index: int) -> int:
        """A block to be number ``index`` of the sequence."""
        if not self._free:
            raise ContextError(f"the cache's {self.n_cells} positions are in use")
        block = self._free.take(sequence.row, index)
        self._users[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block] == 0:
            self._free.give(block)

    def _own(self, sequence: CacheSequence, indices: Rows[int]) -> None:
        """Replace shared blocks among ``indices`` by copies of their own."""
        shared = [i for i in indices if self._users[sequence.blocks[i]] > 1]
        if len(shared) > len(self._free):
            raise ContextError(
                f"{len(shared)} shared blocks would have to be copied, {len(self._free)} are free"
            )
        for i in shared:
            old, new = sequence.blocks[i], self._take(sequence, i)
            offsets = np.arange(BLOCK_CELLS, dtype=np.int32)
            self.memory.copy(old * BLOCK_CELLS + offsets, new * BLOCK_CELLS + offsets)
            sequence.blocks[i] = new
            self._users[old] -= 1
        self._write_table(sequence)

    def _write_table(self, sequence: CacheSequence) -> None:
        self.block_table[sequence.row, : len(sequence.blocks)] = sequence.blocks


def _shares(backend: _core.CpuBackend, planned: Rows[MemoryShare] | None) -> Rows[MemoryShare]:
    """A share for each node that the backend computes on."""
    nodes = backend.nodes
    if len(nodes) < 2:
        return [MemoryShare((), 1)]
    if planned is not None:
        return planned
    return [MemoryShare(tuple(n.nodes), n.weight if n.cpus else 0) for n in nodes]
