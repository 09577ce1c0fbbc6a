"""Which blocks of the cache lie on which NUMA nodes, and which one a sequence gets next.

Each group of nodes keeps a run of every layer's blocks, in proportion to its cores. A sequence
takes its blocks from the groups in turns, so that all of them read when it is attended to. It
changes groups only where attention's tasks end: a task is a power of two of cells, about 1/64 of
the context, so runs are a power of two of blocks, about 1/32 of the longest one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mla_backend import _core

#: Runs of blocks that a sequence as long as the cache is spread in.
_RUNS = 32


def split_blocks(n_blocks: int, weights: Sequence[int], block_bytes: int) -> tuple[int, ...]:
    """Where each group's blocks begin, and ``n_blocks`` at the end.

    They begin with a page where there are enough blocks to choose from.
    """
    page = _core.page_bytes()
    granule = page // math.gcd(page, block_bytes)
    if n_blocks < 4 * granule * len(weights):
        granule = 1
    return tuple(_core.split_rows_over_nodes(n_blocks, weights, granule))


class FreeBlocks:
    """Blocks that no sequence uses, by the group that has them.

    Attributes:
        begins: [groups + 1] where each group's blocks begin.
    """

    def __init__(self, begins: Sequence[int]) -> None:
        self.begins = tuple(begins)
        n_blocks = self.begins[-1]
        parts = zip(self.begins, self.begins[1:], strict=False)
        self._free = [list(range(end - 1, begin - 1, -1)) for begin, end in parts]
        self._run = 1 << max(0, math.ceil(math.log2(max(n_blocks, 1) / _RUNS)))
        self._turns = _turns([len(blocks) for blocks in self._free])

    def __len__(self) -> int:
        return sum(len(blocks) for blocks in self._free)

    def __iter__(self) -> Iterator[int]:
        return (block for blocks in self._free for block in blocks)

    def take(self, sequence: int, index: int) -> int:
        """A block to be number ``index`` of a sequence; sequences begin with different groups.

        It is another group's where that one has none left. There must be one.
        """
        group = self._turns[(sequence + index // self._run) % len(self._turns)]
        blocks = self._free[group] or max(self._free, key=len)
        return blocks.pop()

    def give(self, block: int) -> None:
        """Take it back."""
        group = sum(begin <= block for begin in self.begins[1:-1])
        self._free[group].append(block)


def _turns(sizes: Sequence[int]) -> list[int]:
    """Groups in an order in which each comes up as often as its size asks for."""
    total = max(sum(sizes), 1)
    n_turns = min(total, 64)
    counts = [0] * len(sizes)
    turns = []
    for turn in range(1, n_turns + 1):
        behind = [size * turn / total - n for size, n in zip(sizes, counts, strict=True)]
        group = behind.index(max(behind))
        counts[group] += 1
        turns.append(group)
    return turns or [0]
