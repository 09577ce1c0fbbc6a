"""On which NUMA nodes memory lies, against where it belongs; strays are moved back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mla_backend import _core
from mla_backend.errors import DeviceError
from mla_backend.loading import Part

#: Pages of a part that are asked for one by one; larger parts are looked at in even steps, and
#: wholly where a stray shows up. A million takes a fifth of a second.
_MOST_ASKED: Final = 1 << 20
_AT_LOAD: Final = 1 << 13
#: Less of the pages where they belong is worth a note.
_EXPECTED: Final = 0.995


@dataclass(frozen=True)
class PartResidency:
    """Where one part lies.

    Attributes:
        label: what it is.
        nodes: where it belongs; empty: anywhere.
        n_bytes: its size.
        n_pages: pages that were asked for and have been touched.
        n_local: of them, those on ``nodes``, before any was moved.
        n_moved: strays that were moved back.
        absent_bytes: what nobody has touched yet, so that it lies nowhere.
        node_bytes: bytes by node, as they lie in the end.
    """

    label: str
    nodes: tuple[int, ...]
    n_bytes: int
    n_pages: int
    n_local: int
    n_moved: int
    absent_bytes: int
    node_bytes: Mapping[int, int]

    @property
    def n_strays(self) -> int:
        """Pages that were found elsewhere."""
        return self.n_pages - self.n_local

    @property
    def local_share(self) -> float:
        """Part of the pages that lie where they belong, in the end."""
        return (self.n_local + self.n_moved) / self.n_pages if self.n_pages else 1.0


@dataclass(frozen=True)
class PlacementReport:
    """Where a model's memory lies."""

    parts: tuple[PartResidency, ...]

    @property
    def node_bytes(self) -> dict[int, int]:
        """Bytes on each node."""
        total: Counter[int] = Counter()
        for part in self.parts:
            total.update(part.node_bytes)
        return dict(total)

    @property
    def local_share(self) -> float:
        """Part of the bytes that lie where they belong."""
        sizes = [part.n_bytes - part.absent_bytes for part in self.parts]
        if not sum(sizes):
            return 1.0
        shares = (part.local_share for part in self.parts)
        return sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)

    @property
    def n_strays(self) -> int:
        """Pages that were found elsewhere."""
        return sum(part.n_strays for part in self.parts)


def placement_report(parts: Sequence[Part], *, repair: bool) -> PlacementReport:
    """Ask the kernel. Raises DeviceError where it does not tell.

    Parts of one label count as one.
    """
    by_label: dict[str, PartResidency] = {}
    for part in parts:
        found = _examine(part, repair)
        before = by_label.get(part.label)
        by_label[part.label] = found if before is None else _sum(before, found)
    return PlacementReport(tuple(by_label.values()))


def _sum(a: PartResidency, b: PartResidency) -> PartResidency:
    return PartResidency(
        label=a.label,
        nodes=a.nodes,
        n_bytes=a.n_bytes + b.n_bytes,
        n_pages=a.n_pages + b.n_pages,
        n_local=a.n_local + b.n_local,
        n_moved=a.n_moved + b.n_moved,
        absent_bytes=a.absent_bytes + b.absent_bytes,
        node_bytes=dict(Counter(a.node_bytes) + Counter(b.node_bytes)),
    )


def placement_notes(parts: Sequence[Part]) -> list[str]:
    """What has to be said of weights that were just placed; strays are moved back.

    A few thousand pages of each part are looked at, all of them where one is astray.
    """
    notes = []
    for part in parts:
        try:
            found = _examine(part, repair=True, most_asked=_AT_LOAD)
        except DeviceError as error:
            return [f"numa: where weights lie cannot be verified: {error}"]
        if found.local_share < _EXPECTED:
            notes.append(
                f"numa: {100 * (1 - found.local_share):.1f} % of the {part.label} lie elsewhere "
                "and cannot be moved"
            )
    return notes


def _examine(part: Part, repair: bool, most_asked: int = _MOST_ASKED) -> PartResidency:
    n_bytes = part.end - part.begin
    step = max(_core.page_bytes(), n_bytes // most_asked)
    counts = _core.pages_by_node(part.memory, part.begin, n_bytes, step)
    n_moved = 0
    if part.nodes and any(node >= 0 and node not in part.nodes for node in counts):
        counts = _core.pages_by_node(part.memory, part.begin, n_bytes)
        if repair:
            n_moved = _core.move_strays(part.memory, part.nodes, part.begin, n_bytes)
    n_asked = sum(counts.values())
    present = {node: n for node, n in counts.items() if node >= 0}
    n_pages = sum(present.values())
    lies = present if not n_moved else _core.pages_by_node(part.memory, part.begin, n_bytes)
    return PartResidency(
        label=part.label,
        nodes=part.nodes,
        n_bytes=n_bytes,
        n_pages=n_pages,
        n_local=sum(n for node, n in present.items() if not part.nodes or node in part.nodes),
        n_moved=n_moved,
        absent_bytes=n_bytes * (n_asked - n_pages) // max(n_asked, 1),
        node_bytes={node: n_bytes * n // max(n_asked, 1) for node, n in lies.items() if node >= 0},
    )
