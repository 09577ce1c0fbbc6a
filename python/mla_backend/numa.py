"""Which memory nodes compute together, and what each of them keeps of the weights.

A node is what the kernel calls one: memory, and the CPUs next to it. Firmware may show a socket as
one node, as one for each set of memory channels (NPS4, sub-NUMA clusters) or as one for each L3
cache ("L3 as NUMA"). Splitting pays between sockets, where the link is several times slower than
memory. Within a socket it gains a few per cent at best, and costs more, smaller parts.

Hence the rule: nodes of one socket that are no further apart than distance 15 are one group, whose
memory is used in turns, page by page. Two sockets are two groups, whatever the firmware shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from mla_backend import _core
from mla_backend.errors import MemoryLimitError, UsageError

NumaMode = Literal["auto", "shard", "interleave", "off"]
MODES: Final = get_args(NumaMode)

#: Distances are 10 to the node itself, 11 or 12 within a socket, 20 to 32 between sockets.
_SAME_GROUP: Final = 15
#: Part of a node's free memory that is left alone, for stacks and page tables; at least so much.
_RESERVE: Final = 0.02
_RESERVE_BYTES: Final = 32 << 20
#: Part of the available memory that placed weights may take where mapped ones would do.
_COMFORTABLE: Final = 0.9
_GIB: Final = 1 << 30
_NUMBERS: Final = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
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
    """

    nodes: tuple[int, ...]
    spare: tuple[int, ...]
    cpus: tuple[int, ...]
    n_cores: int
    free_bytes: int
    spare_bytes: int

    @property
    def label(self) -> str:
        """``node 0`` or ``nodes 0-3``."""
        return _label(self.nodes)

    @property
    def text(self) -> str:
        """The group in one line."""
        if not self.nodes:
            return f"all memory, {self.n_cores} cores"
        spare = f", and the memory of {_label(self.spare)}" if self.spare else ""
        return f"{self.label}: {self.n_cores} cores, {self.free_bytes / _GIB:.1f} GiB free{spare}"


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
    if mode == "auto":
        policy, _ = topology.policy
        if policy in _LEFT_ALONE and choice is None:
            note = f"numa: this process has the memory policy {policy}, which is left as it is"
            return NumaPlan("off", groups, (note,))
        several = any(len(group.nodes) > 1 for group in groups)
        mode = "shard" if len(groups) > 1 else "interleave" if several else "off"
    return NumaPlan(mode, groups, is_chosen=choice is not None)


def group_nodes(topology: _core.Topology, choice: str | None = None) -> list[NodeGroup]:
    """The nodes that this process may use, grouped by the rule above or as ``choice`` has it.

    CPUs without memory of their own work for the nearest group; memory without CPUs is the spare of
    the nearest group. Raises UsageError.
    """
    by_id = {node.id: node for node in topology.nodes}
    parts = None if choice is None else _parse(choice, by_id)
    chosen = set(by_id) if parts is None else {i for part in parts for i in part}
    full = [i for i in by_id if i in chosen and by_id[i].usable and by_id[i].may_allocate]
    if not full:
        if choice is not None:
            raise UsageError(f"numa_nodes {choice!r}: {_why_not(topology)}")
        return [_whole_machine()]
    if parts is None:
        grouped = _by_distance(topology, full)
    else:
        grouped = [
            group
            for part in parts
            for group in (
                [[i for i in part if i in full]]
                if len(parts) > 1
                else _by_distance(topology, [i for i in part if i in full])
            )
            if group
        ]
    return [_make_group(topology, grouped, group, chosen) for group in grouped]


def settle(plan: NumaPlan, n_bytes: int, *, required: bool) -> NumaPlan:
    """The plan for weights of ``n_bytes``, which decides how they are shared out.

    Where a group has too little free memory for its share by cores, all shares follow free memory.
    Memory without CPUs is taken last.

    Args:
        required: raise MemoryLimitError, with every node's numbers, where they do not fit; else
            they stay mapped, and a note says why.
    """
    groups = plan.groups
    cores = tuple(group.n_cores for group in groups)
    if plan.mode == "off":
        return replace(plan, weights=cores)
    free = _core.available_memory_bytes()
    if not required:  # cache and workspace want room as well; mapped weights would leave it
        free = int(free * _COMFORTABLE)
    for uses_spare in (False, True):
        rooms = [_room(group, uses_spare) for group in groups]
        if n_bytes > min(sum(rooms), free):
            continue
        by_cores = plan.mode == "interleave" or all(
            n_bytes * n <= room * sum(cores) for n, room in zip(cores, rooms, strict=True)
        )
        weights = cores if by_cores else tuple(room >> 20 for room in rooms)
        notes = [] if by_cores else [_shares_text(n_bytes, groups, weights)]
        if uses_spare:
            notes.append(
                f"numa: {n_bytes / _GIB:.1f} GiB of weights do not fit beside the CPUs: the rest "
                "goes to nodes without CPUs"
            )
        return replace(plan, weights=weights, uses_spare=uses_spare, notes=(*plan.notes, *notes))
    problem = (
        f"{n_bytes / _GIB:.2f} GiB of weights do not fit into the memory of the NUMA nodes: "
        + "; ".join(_room_text(group) for group in groups)
        + f"; {free / _GIB:.2f} GiB available to this process"
    )
    if required:
        raise MemoryLimitError(problem)
    note = f"numa: {problem}; they are mapped, not placed"
    return replace(plan, mode="off", weights=cores, notes=(*plan.notes, note))


def _shares_text(n_bytes: int, groups: Sequence[NodeGroup], weights: Sequence[int]) -> str:
    shares = ", ".join(
        f"{group.label} {100 * weight / sum(weights):.0f} %"
        for group, weight in zip(groups, weights, strict=True)
    )
    return (
        f"numa: {n_bytes / _GIB:.1f} GiB of weights are shared out by free memory, not by cores: "
        f"{shares}"
    )


def _room(group: NodeGroup, spare: bool) -> int:
    free = group.free_bytes + (group.spare_bytes if spare else 0)
    return max(0, free - max(_RESERVE_BYTES, int(free * _RESERVE)))


def _room_text(group: NodeGroup) -> str:
    text = f"{group.label} {group.free_bytes / _GIB:.2f} GiB free"
    if group.spare:
        text += f", {group.spare_bytes / _GIB:.2f} on {_label(group.spare)} without CPUs"
    return text


def _by_distance(topology: _core.Topology, nodes: Sequence[int]) -> list[list[int]]:
    """Groups of nodes that are near each other, directly or through others; ascending."""
    groups: list[list[int]] = []
    for node in nodes:
        near = [g for g in groups if any(_is_near(topology, node, other) for other in g)]
        groups = [g for g in groups if g not in near]
        groups.append(sorted([node, *(i for g in near for i in g)]))
    return sorted(groups)


def _is_near(topology: _core.Topology, a: int, b: int) -> bool:
    same_package = _package(topology, a) == _package(topology, b)
    return same_package and _distance(topology, a, b) <= _SAME_GROUP


def _package(topology: _core.Topology, node: int) -> int:
    return next((cpu.package for cpu in _node(topology, node).cpus), -1)


def _distance(topology: _core.Topology, a: int, b: int) -> int:
    """The larger of both directions; where the kernel tells none, all others are far."""
    ids = [node.id for node in topology.nodes]
    known = [
        _node(topology, i).distance[ids.index(j)]
        for i, j in ((a, b), (b, a))
        if _node(topology, i).distance
    ]
    return max(known, default=10 if a == b else 255)


def _node(topology: _core.Topology, number: int) -> _core.NumaNode:
    return next(node for node in topology.nodes if node.id == number)


def _make_group(
    topology: _core.Topology, groups: list[list[int]], own: list[int], chosen: set[int]
) -> NodeGroup:
    def is_nearest(node: int) -> bool:
        return own == min(
            groups, key=lambda group: (min(_distance(topology, node, i) for i in group), group[0])
        )

    lone_cpus = [
        node.id
        for node in topology.nodes
        if node.id in chosen and node.usable and not node.may_allocate and is_nearest(node.id)
    ]
    spare = [
        node.id
        for node in topology.nodes
        if node.id in chosen and node.may_allocate and not node.usable and is_nearest(node.id)
    ]
    cpus, n_cores = _cores_first([_node(topology, i) for i in (*own, *lone_cpus)])
    return NodeGroup(
        nodes=tuple(own),
        spare=tuple(spare),
        cpus=tuple(cpus),
        n_cores=n_cores,
        free_bytes=sum(_node(topology, i).free_bytes for i in own),
        spare_bytes=sum(_node(topology, i).free_bytes for i in spare),
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
            part += range(int(first), int(last or first) + 1)
        parts.append(part)
    named = [node for part in parts for node in part]
    if len(set(named)) != len(named):
        raise UsageError(f"numa_nodes {choice!r} names a node twice")
    for node in named:
        if node not in by_id:
            here = ranges(sorted(by_id)) or "none"
            raise UsageError(f"numa_nodes {choice!r}: no node {node}; here are {here}")
        if not (by_id[node].usable or by_id[node].may_allocate):
            raise UsageError(f"numa_nodes {choice!r}: this process may not use node {node}")
    return parts


def _why_not(topology: _core.Topology) -> str:
    usable = [node.id for node in topology.nodes if node.usable and node.may_allocate]
    return (
        "none of them has both memory and CPUs that this process may use; "
        f"those that have: {ranges(usable) or 'none'}"
    )


def _label(nodes: Sequence[int]) -> str:
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
