"""Nodes of made-up machines: what is read of them, how they are grouped, what each one keeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from machines import GIB_KB, Node, make_machine, sockets
from mla_backend import _core
from mla_backend.errors import MemoryLimitError, UsageError
from mla_backend.numa import NodeGroup, NumaPlan, group_nodes, plan_numa
from mla_backend.settling import Demand, settle

GIB = 1 << 30


def nodes_of(groups: Sequence[NodeGroup]) -> list[tuple[int, ...]]:
    return [group.nodes for group in groups]


def grouped(root: str, choice: str | None = None) -> list[tuple[int, ...]]:
    return nodes_of(group_nodes(_core.read_topology(root), choice))


def uneven(tmp_path: Path, free_gib: Sequence[float], **more: object) -> list[NodeGroup]:
    """Two-core nodes far from each other with so much free memory."""
    n = len(free_gib)
    nodes = [
        Node(
            i,
            [(2 * i, 2 * i, i, 2 * i), (2 * i + 1, 2 * i + 1, i, 2 * i)],
            free_kb=int(free * GIB_KB),
            distance=[10 if i == j else 21 for j in range(n)],
        )
        for i, free in enumerate(free_gib)
    ]
    return group_nodes(_core.read_topology(make_machine(tmp_path, nodes)))


def test_this_machine() -> None:
    topology = _core.read_topology()
    mode, nodes = topology.policy
    assert isinstance(mode, str)
    assert all(isinstance(node, int) for node in nodes)
    if topology.nodes:
        usable = sorted(cpu for node in topology.nodes for cpu in node.usable)
        assert usable == _core.usable_cpus()
        assert any(node.may_allocate for node in topology.nodes)
    assert plan_numa("auto").groups


def test_what_is_read(tmp_path: Path) -> None:
    nodes = sockets(2, 1, 16, lambda *_: 10)
    topology = _core.read_topology(make_machine(tmp_path, nodes))
    assert [node.id for node in topology.nodes] == [0, 1]
    second = topology.nodes[1]
    assert second.distance == [32, 10]
    assert second.usable == [*range(16, 32), *range(48, 64)]
    assert second.total_bytes == 64 * GIB
    assert second.free_bytes == 60 * GIB
    assert second.may_allocate
    place = next(place for place in second.cpus if place.cpu == 57)
    assert (place.core, place.package, place.l3) == (25, 1, 24)
    assert topology.policy == ("default", [])


def test_one_cpu_of_each_core_comes_first(tmp_path: Path) -> None:
    root = make_machine(tmp_path, sockets(2, 1, 4, lambda *_: 10))
    first, second = group_nodes(_core.read_topology(root))
    assert first.cpus == (0, 1, 2, 3, 8, 9, 10, 11)
    assert second.cpus == (4, 5, 6, 7, 12, 13, 14, 15)
    assert first.n_cores == second.n_cores == 4


@pytest.mark.parametrize("near", [11, 12])
@pytest.mark.parametrize("per_socket", [1, 2, 4, 8, 16])
def test_sockets_are_groups(tmp_path: Path, per_socket: int, near: int) -> None:
    # NPS1, NPS2, NPS4, sub-NUMA clusters, and L3 caches as nodes.
    root = make_machine(tmp_path, sockets(2, per_socket, 8, lambda *_: near))
    both = [tuple(range(per_socket)), tuple(range(per_socket, 2 * per_socket))]
    assert grouped(root) == both
    assert plan_numa("auto", root=root).mode == "shard"


def test_caches_as_nodes_in_quarters_of_a_socket(tmp_path: Path) -> None:
    # Two caches a quarter: 11 within it, 12 to the others.
    root = make_machine(tmp_path, sockets(2, 8, 8, lambda a, b: 11 if a // 2 == b // 2 else 12))
    assert grouped(root) == [tuple(range(8)), tuple(range(8, 16))]
    assert grouped(root, "0,1/2,3/4,5/6,7") == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_one_socket_of_several_nodes_takes_turns(tmp_path: Path) -> None:
    root = make_machine(tmp_path, sockets(1, 4, 4, lambda *_: 12))
    plan = plan_numa("auto", root=root)
    assert (plan.mode, nodes_of(plan.groups)) == ("interleave", [(0, 1, 2, 3)])
    assert plan_numa("shard", root=root).mode == "shard"
    assert len(plan_numa("auto", "0/1/2/3", root=root).groups) == 4


def test_one_node_is_off(tmp_path: Path) -> None:
    root = make_machine(tmp_path, sockets(1, 1, 4, lambda *_: 10))
    assert plan_numa("auto", root=root).mode == "off"


def test_no_nodes_at_all(tmp_path: Path) -> None:
    plan = plan_numa("auto", root=make_machine(tmp_path, []))
    assert plan.mode == "off"
    assert nodes_of(plan.groups) == [()]


def test_near_nodes_of_two_sockets_stay_apart(tmp_path: Path) -> None:
    nodes = [Node(i, [(i, i, i, i)], distance=[10, 12] if i == 0 else [12, 10]) for i in range(2)]
    assert grouped(make_machine(tmp_path, nodes)) == [(0,), (1,)]


def test_memory_without_cpus_is_spare(tmp_path: Path) -> None:
    nodes = [
        Node(0, [(0, 0, 0, 0)], distance=[10, 21, 14]),
        Node(1, [(1, 1, 1, 1)], distance=[21, 10, 24]),
        Node(2, free_kb=200 * GIB_KB, distance=[14, 24, 10]),
    ]
    first, second = group_nodes(_core.read_topology(make_machine(tmp_path, nodes)))
    assert (first.nodes, first.spare, first.spare_bytes) == ((0,), (2,), 200 * GIB)
    assert (second.nodes, second.spare) == ((1,), ())


def test_cpus_without_memory_work_for_the_nearest(tmp_path: Path) -> None:
    nodes = [
        Node(0, [(0, 0, 0, 0)], distance=[10, 20, 30]),
        Node(1, [(1, 1, 1, 1)], distance=[20, 10, 16]),
        Node(3, [(2, 2, 1, 1)], total_kb=0, free_kb=0, distance=[30, 16, 10]),
    ]
    groups = group_nodes(_core.read_topology(make_machine(tmp_path, nodes)))
    assert nodes_of(groups) == [(0,), (1,)]
    assert [group.cpus for group in groups] == [(0,), (1, 2)]


def test_numbers_with_gaps_and_offline_cpus(tmp_path: Path) -> None:
    nodes = [
        Node(2, [(4, 4, 0, 4), (5, 5, 0, 4)], distance=[10, 21]),
        Node(8, [(12, 12, 1, 12)], distance=[21, 10]),  # its CPU 13 is offline
    ]
    root = make_machine(tmp_path, nodes)
    (tmp_path / "sys/devices/system/cpu/cpu13/topology").mkdir(parents=True)
    groups = group_nodes(_core.read_topology(root))
    assert nodes_of(groups) == [(2,), (8,)]
    assert [group.n_cores for group in groups] == [2, 1]
    assert grouped(root, "8") == [(8,)]


def test_affinity_and_cpuset_are_obeyed(tmp_path: Path) -> None:
    nodes = sockets(2, 1, 4, lambda *_: 10)
    root = make_machine(tmp_path, nodes, allowed_cpus="1-2,8", allowed_nodes="0")
    topology = _core.read_topology(root)
    assert [node.may_allocate for node in topology.nodes] == [True, False]
    (group,) = group_nodes(topology)
    assert (group.nodes, group.cpus, group.n_cores) == ((0,), (1, 2, 8), 3)


def test_cpus_of_one_node_with_the_memory_of_both(tmp_path: Path) -> None:
    nodes = sockets(2, 1, 4, lambda *_: 10)
    root = make_machine(tmp_path, nodes, allowed_cpus="0-3,8-11", allowed_nodes="0-1")
    (group,) = group_nodes(_core.read_topology(root))
    assert (group.nodes, group.spare) == ((0,), (1,))
    assert plan_numa("auto", root=root).mode == "off"


def test_binding_policy_is_obeyed(tmp_path: Path) -> None:
    root = make_machine(tmp_path, sockets(2, 1, 4, lambda *_: 10))
    topology = _core.read_topology(root, ("bind", [1]))
    assert [node.may_allocate for node in topology.nodes] == [False, True]
    (group,) = group_nodes(topology)
    assert group.nodes == (1,)
    assert len(group.cpus) == 16  # those of node 0 as well: only memory is bound


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("", "accepted are nodes"),
        ("a", "accepted are nodes"),
        ("0-", "accepted are nodes"),
        ("7", "no node 7; here are 0-1"),
        ("0,0-1", "twice"),
        ("2/0", "no node 2"),
    ],
)
def test_wrong_choices(tmp_path: Path, choice: str, text: str) -> None:
    root = make_machine(tmp_path, sockets(2, 1, 2, lambda *_: 10))
    with pytest.raises(UsageError, match=text):
        plan_numa("auto", choice, root=root)


def test_choices_that_cannot_be(tmp_path: Path) -> None:
    nodes = sockets(2, 1, 2, lambda *_: 10)
    nodes[1] = replace(nodes[1], cpus=())
    root = make_machine(tmp_path, nodes)
    with pytest.raises(UsageError, match=r"both memory and CPUs.*those that have: 0"):
        plan_numa("shard", "1", root=root)
    with pytest.raises(UsageError, match="numa is off"):
        plan_numa("off", "0", root=root)
    with pytest.raises(UsageError, match="accepted are auto, shard, interleave, off"):
        plan_numa("mirror", root=root)  # type: ignore[arg-type]


def far_apart(tmp_path: Path, n: int) -> str:
    """Nodes of one core each, pairs of them at 20, all others at 40."""
    nodes = [
        Node(
            i,
            [(i, i, i, i)],
            distance=[10 if i == j else 20 if i // 2 == j // 2 else 40 for j in range(n)],
        )
        for i in range(n)
    ]
    return make_machine(tmp_path, nodes)


def test_no_more_groups_than_parts(tmp_path: Path) -> None:
    root = far_apart(tmp_path, 64)
    plan = plan_numa("auto", root=root)
    assert nodes_of(plan.groups) == [(i, i + 1) for i in range(0, 64, 2)]
    assert plan.mode == "shard"
    assert "no more than 32 groups" in plan.notes[0]
    every = "/".join(str(i) for i in range(64))
    with pytest.raises(UsageError, match="64 groups; accepted are 32"):
        plan_numa("shard", every, root=root)
    few = plan_numa("auto", "0-31", root=root)
    assert (len(few.groups), few.notes) == (32, ())


def test_ranges_are_checked_before_they_are_built(tmp_path: Path) -> None:
    root = far_apart(tmp_path, 2)
    with pytest.raises(UsageError, match="no node 999999999; here are 0-1"):
        plan_numa("shard", "0-999999999", root=root)
    for choice in ("0-99999999999", "9" * 5000):
        with pytest.raises(UsageError, match="accepted are nodes as in 0-3,8"):
            plan_numa("shard", choice, root=root)


# ---- what each group keeps -----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine's own memory, as much as the made-up ones could have."""
    monkeypatch.setattr(_core, "available_memory_bytes", lambda: 1 << 50)


def shard(groups: Sequence[NodeGroup]) -> NumaPlan:
    return NumaPlan("shard", tuple(groups))


def test_shares_by_cores(tmp_path: Path) -> None:
    plan = settle(shard(uneven(tmp_path, [8, 8])), Demand(10 * GIB), required=True)
    assert (plan.weights, plan.notes, plan.uses_spare) == ((2, 2), (), False)


def test_shares_by_free_memory_where_cores_do_not_fit(tmp_path: Path) -> None:
    plan = settle(shard(uneven(tmp_path, [12, 4])), Demand(12 * GIB), required=True)
    assert plan.weights[0] / plan.weights[1] == pytest.approx(3, rel=0.01)
    assert "node 0 75 %, node 1 25 %" in plan.notes[0]


def test_cache_and_workspace_want_room_too(tmp_path: Path) -> None:
    plan = shard(uneven(tmp_path, [8, 8]))
    assert settle(plan, Demand(10 * GIB, 2 * GIB, 2 * GIB), required=True).weights == (2, 2)
    for demand in (Demand(10 * GIB, 6 * GIB), Demand(10 * GIB, 0, 6 * GIB)):
        with pytest.raises(MemoryLimitError, match=r"10\.00 GiB of weights, .* of workspace do"):
            settle(plan, demand, required=True)
        assert settle(plan, demand, required=False).mode == "off"
    # A node that has room for its weights, and for no more.
    plan = shard(uneven(tmp_path / "uneven", [12, 5.5]))
    assert settle(plan, Demand(10 * GIB), required=True).weights == (2, 2)
    tight = settle(plan, Demand(10 * GIB, 4 * GIB), required=True)
    assert tight.weights[0] > 2 * tight.weights[1]


def test_hardly_any_room(tmp_path: Path) -> None:
    plan = shard(uneven(tmp_path, [33 / 1024, 32.5 / 1024]))
    weights = settle(plan, Demand(5 << 18), required=True).weights
    assert weights[0] > weights[1] > 0


def test_spare_memory_is_used_last(tmp_path: Path) -> None:
    nodes = [
        Node(0, [(0, 0, 0, 0)], free_kb=4 * GIB_KB, distance=[10, 17]),
        Node(1, free_kb=16 * GIB_KB, distance=[17, 10]),
    ]
    plan = shard(group_nodes(_core.read_topology(make_machine(tmp_path, nodes))))
    assert not settle(plan, Demand(3 * GIB), required=True).uses_spare
    more = settle(plan, Demand(12 * GIB), required=True)
    assert more.uses_spare
    assert "without CPUs" in more.notes[0]


def test_what_fits_nowhere_names_every_node(tmp_path: Path) -> None:
    plan = shard(uneven(tmp_path, [2, 1]))
    text = r"node 0 2.00 GiB free; node 1 1.00 GiB free"
    with pytest.raises(MemoryLimitError, match=text):
        settle(plan, Demand(3 * GIB), required=True)
    mapped = settle(plan, Demand(3 * GIB), required=False)
    assert mapped.mode == "off"
    assert re.search(text, mapped.notes[0])


def test_limits_of_the_process_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "available_memory_bytes", lambda: 2 * GIB)
    with pytest.raises(MemoryLimitError, match=r"2\.00 GiB available to this process"):
        settle(shard(uneven(tmp_path, [8, 8])), Demand(3 * GIB), required=True)
