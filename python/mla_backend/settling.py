"""Whether what a model needs has room on the nodes, and in which proportion it is shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from mla_backend import _core
from mla_backend.errors import MemoryLimitError
from mla_backend.numa import NodeGroup, NumaPlan, label_nodes

#: Part of a node's free memory that is left alone, for stacks and page tables; at least so much.
_RESERVE: Final = 0.02
_RESERVE_BYTES: Final = 32 << 20
#: Part of the available memory that may be taken where mapped weights would leave it to others.
_COMFORTABLE: Final = 0.95
_GIB: Final = 1 << 30


@dataclass(frozen=True)
class Demand:
    """Bytes of host memory that a model is going to take.

    Attributes:
        weights_bytes: those that are read onto nodes.
        cache_bytes: cells are shared out as weights are.
        workspace_bytes: intermediates, which lie on all nodes in turns.
    """

    weights_bytes: int
    cache_bytes: int = 0
    workspace_bytes: int = 0

    @property
    def shared_out_bytes(self) -> int:
        """What the groups have in parts."""
        return self.weights_bytes + self.cache_bytes

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.shared_out_bytes + self.workspace_bytes

    @property
    def text(self) -> str:
        """The sum in words."""
        text = f"{self.weights_bytes / _GIB:.2f} GiB of weights"
        if self.cache_bytes or self.workspace_bytes:
            text += f", {self.cache_bytes / _GIB:.2f} of cache and "
            text += f"{self.workspace_bytes / _GIB:.2f} of workspace"
        return text


def settle(plan: NumaPlan, demand: Demand, *, required: bool) -> NumaPlan:
    """The plan for what a model takes, which decides how weights and cache are shared out.

    Where a group has too little free memory for its share by cores, all shares follow free memory.
    Memory without CPUs is taken last.

    Args:
        required: raise MemoryLimitError, with every node's numbers, where it does not fit; else
            weights are not placed, and a note says why.
    """
    if plan.mode == "off":
        return replace(plan, weights=_cores(plan))
    free = _core.available_memory_bytes()
    if not required:
        free = int(free * _COMFORTABLE)
    for uses_spare in (False, True):
        settled = _share_out(plan, demand, uses_spare)
        if settled is not None and demand.total_bytes <= free:
            return settled
    problem = (
        f"{demand.text} do not fit into the memory of the NUMA nodes: "
        + "; ".join(_room_text(group) for group in plan.groups)
        + f"; {free / _GIB:.2f} GiB available to this process"
    )
    if required:
        raise MemoryLimitError(problem)
    return give_up(plan, problem)


def give_up(plan: NumaPlan, problem: str) -> NumaPlan:
    """The plan without placement, with a note why."""
    note = f"numa: {problem}; weights are not placed"
    return replace(
        plan, mode="off", weights=_cores(plan), uses_spare=False, notes=(*plan.notes, note)
    )


def _share_out(plan: NumaPlan, demand: Demand, uses_spare: bool) -> NumaPlan | None:
    """By cores or by free memory; None: that memory is too little."""
    groups, cores = plan.groups, _cores(plan)
    n_nodes = max(len(plan.nodes), 1)
    rooms = [
        max(0, _room(group, uses_spare) - demand.workspace_bytes * len(group.nodes) // n_nodes)
        for group in groups
    ]
    needed = demand.shared_out_bytes
    if needed > sum(rooms):
        return None
    by_cores = plan.mode == "interleave" or all(
        needed * n <= room * sum(cores) for n, room in zip(cores, rooms, strict=True)
    )
    weights = cores if by_cores else tuple(rooms)
    notes = [] if by_cores else [_shares_text(demand, groups, weights)]
    if uses_spare:
        notes.append(
            f"numa: {demand.text} do not fit beside the CPUs: the rest goes to nodes without CPUs"
        )
    return replace(plan, weights=weights, uses_spare=uses_spare, notes=(*plan.notes, *notes))


def _cores(plan: NumaPlan) -> tuple[int, ...]:
    return tuple(group.n_cores for group in plan.groups)


def _shares_text(demand: Demand, groups: Sequence[NodeGroup], weights: Sequence[int]) -> str:
    shares = ", ".join(
        f"{group.label} {100 * weight / sum(weights):.0f} %"
        for group, weight in zip(groups, weights, strict=True)
    )
    return f"numa: {demand.text} are shared out by free memory, not by cores: {shares}"


def _room(group: NodeGroup, spare: bool) -> int:
    free = group.free_bytes + (group.spare_bytes if spare else 0)
    return max(0, free - max(_RESERVE_BYTES, int(free * _RESERVE)))


def _room_text(group: NodeGroup) -> str:
    text = f"{group.label} {group.free_bytes / _GIB:.2f} GiB free"
    if group.spare:
        text += f", {group.spare_bytes / _GIB:.2f} on {label_nodes(group.spare)} without CPUs"
    return text
