"""Weight bytes that threads read, by the NUMA nodes they ran on and the nodes the bytes lie on.

Counted from the tasks that ran, with the nodes that the kernel reports for the pages afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from mla_backend import _core


@dataclass
class ReadTraffic:
    """What was read, once counting has ended.

    Attributes:
        groups: nodes that count as one.
        reads: (thread, node it ran on, node of the bytes, bytes); node -1: nobody has touched them.
    """

    groups: Sequence[Sequence[int]] = ()
    reads: list[tuple[int, int, int, int]] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """All that was read."""
        return sum(n_bytes for *_, n_bytes in self.reads)

    @property
    def remote_bytes(self) -> int:
        """What was read from another group of nodes than the thread ran on."""
        return sum(n for _, ran_on, lies_on, n in self.reads if not self._is_near(ran_on, lies_on))

    @property
    def remote_share(self) -> float:
        """``remote_bytes`` as a part of ``n_bytes``; 0 where nothing was read."""
        return self.remote_bytes / self.n_bytes if self.reads else 0.0

    @property
    def by_thread(self) -> dict[int, dict[int, int]]:
        """Bytes by thread and by the node they lie on."""
        table: defaultdict[int, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
        for thread, _, lies_on, n_bytes in self.reads:
            table[thread][lies_on] += n_bytes
        return {thread: dict(nodes) for thread, nodes in table.items()}

    def _is_near(self, a: int, b: int) -> bool:
        return a == b or any(a in group and b in group for group in self.groups)


@contextmanager
def counting(
    backend: _core.CpuBackend, groups: Sequence[Sequence[int]] = ()
) -> Iterator[ReadTraffic]:
    """Count what ``backend`` reads within; the result is there afterwards.

    Raises DeviceError where the kernel does not tell the nodes of pages.
    """
    traffic = ReadTraffic(groups)
    backend.count_reads(True)
    try:
        yield traffic
        traffic.reads += backend.take_reads()
    finally:
        backend.count_reads(False)
