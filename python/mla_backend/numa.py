"""Which memory nodes compute together, and what each of them keeps of the weights.

A node is what the kernel calls one: memory, and the CPUs next to it. Firmware may show a socket as
one node, as one for each set of memory channels (NPS4, sub-NUMA clusters) or as one for each L3
cache ("L3 as NUMA"). Splitting pays between sockets, where the link is several times slower than
memory. Within a socket it gains a few per cent at best, and costs more, smaller parts.

Hence the rule: nodes of one socket that are no further apart than distance 15 are one group, whose
memory is used in turns, page by page. Two sockets are two groups, whatever the firmware shows.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from mla_backend import _core
from mla_backend.errors import UsageError

NumaMode = Literal["auto", "shard", "interleave", "off"]
MODES: Final = get_args(NumaMode)

#: Distances are 10 to the node itself, 11 or 12 within a socket, 20 to 32 between sockets.
_SAME_GROUP: Final = 15
#: Parts that the engine keeps (``kMaxNodes``).
_MOST_GROUPS: Final = 32
_GIB: Final = 1 << 30
_NUMBERS: Final = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*")
_LEFT_ALONE: Final = ("preferred", "preferred-many", "interleave", "weighted-interleave")


@dataclass(frozen=True)
class NodeGroup:
    """Nodes that keep one part of the weights and compute with it.

    Attributes:
        nodes: whose memory it is; of several, page by page in turns.
        spare: nodes without CPUs (expanders) next to it, for what finds no room otherwise.
        cpus: one of each core first, then the cores' other hardware threads.
        n_cores: physical cores: its share of the weights where memory allows.
        free_bytes, spare_bytes: free memory of ``nodes`` and of ``spare``.
        is_merged: whether nodes that are far from each other had to share it.
    """

    nodes: tuple[int, ...]
    spare: tuple[int, ...]
    cpus: tuple[int, ...]
    n_cores: int
    free_bytes: int
    spare_bytes: int
    is_merged: bool = False

    @property
    def label(self) -> str:
        """``node 0`` or ``nodes 0-3``."""
        return label_nodes(self.nodes)

    @property
    def text(self) -> str:
        """The group in one line."""
        if not self.nodes:
            return f"all memory, {self.n_cores} cores"
        spare = f", and the memory of {label_nodes(self.spare)}" if self.spare else ""
        return f"{self.label}: {self.n_cores} cores, {self.free_bytes / _GIB:.1f} GiB free{spare}"


@dataclass(frozen=True)
class MemoryShare:
    """A group's part of what is shared out.

    Attributes:
        nodes: where it lies; spare: where else, once those are full.
        weight: in which proportion.
    """

    nodes: tuple[int, ...]
    weight: int
    spare: tuple[int, ...] = ()


@dataclass(frozen=True)
class NumaPlan:
    """How a model uses the nodes.

    Attributes:
        mode: what "auto" became.
        groups: parts of the machine; one at least, without nodes where the kernel shows none.
        notes: one-line statements for the user.
        weights: in which proportion rows and threads are shared out among the groups.
        uses_spare: whether memory without CPUs is needed.
        is_chosen: whether the nodes were named, so that threads run on them alone.
    """

    mode: Literal["shard", "interleave", "off"]
    groups: tuple[NodeGroup, ...]
    notes: tuple[str, ...] = ()
    weights: tuple[int, ...] = ()
    uses_spare: bool = False
    is_chosen: bool = False

    @property
    def nodes(self) -> tuple[int, ...]:
        """All nodes whose memory is used, ascending."""
        return tuple(sorted(node for group in self.groups for node in group.nodes))

    @property
    def memory(self) -> tuple[MemoryShare, ...]:
        """What of weights and cache each group keeps."""
        return tuple(
            MemoryShare(group.nodes, weight, group.spare if self.uses_spare else ())
            for group, weight in zip(self.groups, self.weights, strict=True)
        )

    @property
    def confines_threads(self) -> bool:
        """Whether threads run on the groups' CPUs only, each thread on those of its group."""
        return self.mode == "shard" or self.is_chosen

    @property
    def shares(self) -> list[_core.NodeShare]:
        """The groups, with threads by cores: memory may be shared out otherwise."""
        return [
            _core.NodeShare(list(group.nodes), list(group.cpus), group.n_cores)
            for group in self.groups
        ]


def plan_numa(mode: NumaMode, choice: str | None = None, *, root: str = "") -> NumaPlan:
    """Decide for this process, by its affinity mask, its cpuset and its memory policy.

    Args:
        mode: "shard": each group keeps its rows of every weight. "interleave": pages in turns over
            all nodes. "off": where the kernel puts them. "auto": shard with more than one group,
            interleave in one group of several nodes, else off.
        choice: nodes to use, "0-3,8"; with "/" between groups, "0,1/2,3", the groups as well.
        root: stands before /proc and /sys.

    Raises UsageError for nodes that are not here or must not be used.
    """
    if mode not in MODES:
        raise UsageError(f"numa {mode!r}; accepted are {', '.join(MODES)}")
    if choice is not None and mode == "off":
        raise UsageError("numa_nodes chooses nodes to place weights on, and numa is off")
    topology = _core.read_topology(root)
    groups = tuple(group_nodes(topology, choice))
    notes = _notes(groups)
    if mode == "auto":
        policy, _ = topology.policy
        if policy in _LEFT_ALONE and choice is None:
            note = f"numa: this process has the memory policy {policy}, which is left as it is"
            return NumaPlan("off", groups, (note,))
        several = any(len(group.nodes) > 1 for group in groups)
        mode = "shard" if len(groups) > 1 else "interleave" if several else "off"
    return NumaPlan(mode, groups, notes, is_chosen=choice is not None)


def group_nodes(topology: _core.Topology, choice: str | None = None) -> list[NodeGroup]:
    """The nodes that this process may use, grouped by the rule above or as ``choice`` has it.

    CPUs without memory of their own work for the nearest group; memory without CPUs is the spare of
    the nearest group. More groups than the engine has parts for are merged, nearest first. Raises
    UsageError.
    """
    machine = _Machine(topology)
    by_id = machine.nodes
    parts = None if choice is None else _parse(choice, by_id)
    chosen = set(by_id) if parts is None else {i for part in parts for i in part}
    full = [i for i in by_id if i in chosen and by_id[i].usable and by_id[i].may_allocate]
    if not full:
        if choice is not None:
            raise UsageError(f"numa_nodes {choice!r}: {_why_not(by_id)}")
        return [_whole_machine()]
    if parts is None or len(parts) == 1:
        grouped = machine.merged(machine.by_distance(full))
    else:
        grouped = [[i for i in part if i in full] for part in parts]
        grouped = [group for group in grouped if group]
        if len(grouped) > _MOST_GROUPS:
            raise UsageError(
                f"numa_nodes {choice!r}: {len(grouped)} groups; accepted are {_MOST_GROUPS}"
            )
    return [_make_group(machine, grouped, group, chosen) for group in grouped]


def _notes(groups: Sequence[NodeGroup]) -> tuple[str, ...]:
    merged = len(groups) == _MOST_GROUPS and any(group.is_merged for group in groups)
    note = f"numa: nodes far from each other are grouped, to be no more than {_MOST_GROUPS} groups"
    return (note,) if merged else ()


class _Machine:
    """Nodes by number, and how far they are from each other."""

    def __init__(self, topology: _core.Topology) -> None:
        self.nodes = {node.id: node for node in topology.nodes}
        self._package = {
            i: next((cpu.package for cpu in node.cpus), -1) for i, node in self.nodes.items()
        }
        #: Where the kernel tells.
        self._told = {
            (i, j): distance
            for i, node in self.nodes.items()
            for j, distance in zip(self.nodes, node.distance, strict=False)
        }

    def distance(self, a: int, b: int) -> int:
        """The larger of both directions; where the kernel tells none, all others are far."""
        far = 10 if a == b else 255
        known = [self._told[pair] for pair in ((a, b), (b, a)) if pair in self._told]
        return max(known, default=far)

    def by_distance(self, nodes: Sequence[int]) -> list[list[int]]:
        """Groups of nodes that are near each other, directly or through others; ascending."""
        groups: list[list[int]] = []
        for node in nodes:
            near = [g for g in groups if any(self._is_near(node, other) for other in g)]
            groups = [g for g in groups if g not in near]
            groups.append(sorted([node, *(i for g in near for i in g)]))
        return sorted(groups)

    def merged(self, groups: list[list[int]]) -> list[list[int]]:
        """The nearest two made one, the smallest of equally near ones, until there are few."""
        groups = list(groups)
        while len(groups) > _MOST_GROUPS:
            a, b = min(itertools.combinations(groups, 2), key=lambda pair: self._apart(*pair))
            groups = [g for g in groups if g is not a and g is not b]
            groups.append(sorted([*a, *b]))
        return sorted(groups)

    def _is_near(self, a: int, b: int) -> bool:
        return self._package[a] == self._package[b] and self.distance(a, b) <= _SAME_GROUP

    def _apart(self, a: list[int], b: list[int]) -> tuple[int, int, list[int]]:
        return max(self.distance(i, j) for i in a for j in b), len(a) + len(b), sorted([*a, *b])


def _make_group(
    machine: _Machine, groups: list[list[int]], own: list[int], chosen: set[int]
) -> NodeGroup:
    def is_nearest(node: int) -> bool:
        return own == min(
            groups, key=lambda group: (min(machine.distance(node, i) for i in group), group[0])
        )

    lone_cpus = [
        node.id
        for node in machine.nodes.values()
        if node.id in chosen and node.usable and not node.may_allocate and is_nearest(node.id)
    ]
    spare = [
        node.id
        for node in machine.nodes.values()
        if node.id in chosen and node.may_allocate and not node.usable and is_nearest(node.id)
    ]
    cpus, n_cores = _cores_first([machine.nodes[i] for i in (*own, *lone_cpus)])
    return NodeGroup(
        nodes=tuple(own),
        spare=tuple(spare),
        cpus=tuple(cpus),
        n_cores=n_cores,
        free_bytes=sum(machine.nodes[i].free_bytes for i in own),
        spare_bytes=sum(machine.nodes[i].free_bytes for i in spare),
        is_merged=any(machine.distance(i, j) > _SAME_GROUP for i in own for j in own),
    )


def _cores_first(nodes: Iterable[_core.NumaNode]) -> tuple[list[int], int]:
    """Usable CPUs, one of each core before the others, and the number of cores."""
    first: dict[int, int] = {}
    others = []
    for node in nodes:
        usable = set(node.usable)
        for place in node.cpus:
            if place.cpu not in usable:
                continue
            if place.core in first:
                others.append(place.cpu)
            else:
                first[place.core] = place.cpu
    return [*first.values(), *others], len(first)


def _whole_machine() -> NodeGroup:
    """Where the kernel shows no node that this process could use."""
    return NodeGroup(
        nodes=(),
        spare=(),
        cpus=tuple(_core.usable_cpus()),
        n_cores=_core.usable_physical_cores(),
        free_bytes=_core.available_memory_bytes(),
        spare_bytes=0,
    )


def _parse(choice: str, by_id: dict[int, _core.NumaNode]) -> list[list[int]]:
    """``0,1/2-3`` as [[0, 1], [2, 3]]. Raises UsageError."""
    parts = []
    for text in choice.split("/"):
        if not _NUMBERS.fullmatch(text):
            raise UsageError(f"numa_nodes {choice!r}; accepted are nodes as in 0-3,8 or 0,1/2,3")
        part: list[int] = []
        for item in text.split(","):
            first, _, last = item.partition("-")
            if int(last or first) > max(by_id, default=-1):  # before the range is built
                raise UsageError(_not_here(choice, int(last or first), by_id))
            part += range(int(first), int(last or first) + 1)
        parts.append(part)
    named = [node for part in parts for node in part]
    if len(set(named)) != len(named):
        raise UsageError(f"numa_nodes {choice!r} names a node twice")
    for node in named:
        if node not in by_id:
            raise UsageError(_not_here(choice, node, by_id))
        if not (by_id[node].usable or by_id[node].may_allocate):
            raise UsageError(f"numa_nodes {choice!r}: this process may not use node {node}")
    return parts


def _not_here(choice: str, node: int, by_id: Mapping[int, _core.NumaNode]) -> str:
    here = ranges(sorted(by_id)) or "none"
    return f"numa_nodes {choice!r}: no node {node}; here are {here}"


def _why_not(by_id: Mapping[int, _core.NumaNode]) -> str:
    usable = [i for i, node in by_id.items() if node.usable and node.may_allocate]
    return (
        "none of them has both memory and CPUs that this process may use; "
        f"those that have: {ranges(usable) or 'none'}"
    )


def label_nodes(nodes: Sequence[int]) -> str:
    """``node 0`` or ``nodes 0-3``."""
    return f"node{'s' if len(nodes) > 1 else ''} {ranges(nodes)}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as the kernel writes them: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
