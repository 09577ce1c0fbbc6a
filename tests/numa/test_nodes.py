"""Where weights really lie, by the kernel's word, and that nothing else changes with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mla_backend import Model, _core
from mla_backend.numa import NodeGroup, NumaMode, plan_numa, ranges
from small_models import small_model

pytestmark = pytest.mark.numa

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
HERE = Path(__file__).parent
#: Of all pages, where the plan says.
LOCAL = 0.995


def all_groups() -> tuple[NodeGroup, ...]:
    return plan_numa("auto").groups


@pytest.fixture
def groups() -> tuple[NodeGroup, ...]:
    """Those of this machine, where there are several."""
    found = all_groups()
    if len(found) < 2:
        pytest.skip(f"one group of nodes: {found[0].text}")
    return found


def load(path: Path, **options: Any) -> Model:
    return Model.load(path, n_ctx=256, device="cpu", **options)


def test_topology_is_what_was_asked_for() -> None:
    nodes = _core.read_topology().nodes
    assert len(nodes) == int(os.environ.get("NUMA_LAB_NODES", len(nodes)))
    assert sorted(cpu for node in nodes for cpu in node.usable) == _core.usable_cpus()


@pytest.mark.parametrize(
    ("shape", "type", "layout"),
    [("tiny-v2", "f32", "split"), ("tiny-v3", "q8_0", "split"), ("tiny-v2", "q4_k", "legacy")],
)
def test_every_page_is_where_it_was_planned(
    groups: tuple[NodeGroup, ...], shape: str, type: str, layout: str
) -> None:
    with load(small_model(shape, type, layout)) as model:
        assert model.numa.mode == "shard"
        model.generate(PROMPT, max_tokens=4, temperature=0)
        report = model.placement_report(repair=False)
        weights = [part for part in report.parts if part.label.startswith("weights of")]
        assert [part.nodes for part in weights] == [group.nodes for group in groups]
        for part in report.parts:
            assert part.local_share >= LOCAL, part
        assert all(part.absent_bytes == 0 for part in weights)
        shares = np.array([part.n_bytes for part in weights], float)
        wanted = np.array([group.n_cores for group in groups], float)
        np.testing.assert_allclose(shares / shares.sum(), wanted / wanted.sum(), atol=0.06)
        # What is not split is little, but for the table that rows are looked up in.
        whole = sum(part.n_bytes for part in report.parts if part.label == "weights on all nodes")
        table = model.file.tensors["token_embd.weight"].n_bytes
        assert whole - table <= 0.01 * shares.sum()


def test_interleaved_pages_take_turns(groups: tuple[NodeGroup, ...]) -> None:
    with load(small_model(), numa="interleave") as model:
        (part, *_) = model.placement_report(repair=False).parts
        shares = [n_bytes / part.n_bytes for n_bytes in part.node_bytes.values()]
        assert len(shares) == len(plan_numa("interleave").nodes)
        assert max(shares) - min(shares) < 0.05


@pytest.mark.parametrize(("type", "layout"), [("q8_0", "split"), ("f32", "legacy")])
def test_logits_do_not_depend_on_nodes(
    groups: tuple[NodeGroup, ...], type: str, layout: str
) -> None:
    path = small_model("tiny-v2", type, layout)
    with load(path, numa="off", threads=1) as model:
        expected = model.logits(PROMPT).tobytes()
    every = [node for group in groups for node in group.nodes]
    choices = [None, str(every[0]), ranges(every[:2]), "/".join(str(node) for node in every)]
    for choice in choices:
        for threads in (1, 2, 3, 4):
            with load(path, numa="shard", numa_nodes=choice, threads=threads) as model:
                assert model.logits(PROMPT).tobytes() == expected, (choice, threads)
    with load(path, numa="interleave") as model:
        assert model.logits(PROMPT).tobytes() == expected


def test_cache_blocks_are_where_they_were_planned(groups: tuple[NodeGroup, ...]) -> None:
    # Long enough for blocks on every node.
    with Model.load(small_model(), n_ctx=4096, device="cpu") as model:
        model.logits([5] * 1500)
        cache = [
            part
            for part in model.placement_report(repair=False).parts
            if part.label.startswith("cache of")
        ]
        assert [part.nodes for part in cache] == [group.nodes for group in groups]
        for part in cache:
            assert part.local_share >= LOCAL, part
            assert part.n_pages > 0


@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_threads_read_their_own_nodes(groups: tuple[NodeGroup, ...], type: str) -> None:
    with load(small_model("tiny-v2", type)) as model:
        model.generate(PROMPT, max_tokens=2, temperature=0)
        with model.counting_reads() as traffic:
            model.generate(PROMPT, max_tokens=16, temperature=0)
        assert traffic.n_bytes > 0
        assert traffic.remote_share <= 0.01
        readers = {ran_on for _, ran_on, _, _ in traffic.reads}
        assert all(readers & set(group.nodes) for group in groups)


@pytest.mark.parametrize("numa", ["off", "interleave"])
def test_without_placement_threads_read_from_everywhere(
    groups: tuple[NodeGroup, ...], numa: NumaMode
) -> None:
    with load(small_model(), numa=numa, threads=len(_core.usable_cpus())) as model:
        with model.counting_reads() as traffic:
            model.generate(PROMPT, max_tokens=16, temperature=0)
        if numa == "interleave":  # half of it is remote with two nodes, whoever does the work
            assert traffic.remote_share == pytest.approx(1 - 1 / len(groups), abs=0.1)
        else:  # the pages of a small file may all lie together: the other nodes' reads are remote
            assert traffic.remote_share > 0.15


def test_strays_are_moved_back(groups: tuple[NodeGroup, ...]) -> None:
    with load(small_model()) as model:
        part = next(p for p in model._engine.weights.parts if p.nodes == groups[0].nodes)
        away = groups[1].nodes
        # The kernel may have a page in hand, which then stays.
        n_pages = _core.move_strays(part.memory, away, part.begin, 100 * _core.page_bytes())
        assert 90 <= n_pages <= 100
        before = model.logits(PROMPT).tobytes()
        found = next(p for p in model.placement_report(repair=False).parts if p.label == part.label)
        assert (found.n_strays, found.n_moved) == (n_pages, 0)
        assert found.local_share < 1
        report = model.placement_report()
        assert report.n_strays == n_pages
        assert next(p for p in report.parts if p.label == part.label).n_moved >= 0.9 * n_pages
        assert report.local_share >= LOCAL
        assert model.logits(PROMPT).tobytes() == before


# ---- other processes -----------------------------------------------------------------------------


def report_under(*command: str, numa: str = "auto") -> dict[str, Any]:
    """What tests/numa/anonymous_pages.py says when it is run by a command."""
    if command and shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    arguments = [*command, sys.executable, str(HERE / "anonymous_pages.py"), str(small_model())]
    done = subprocess.run([*arguments, numa], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("bound", ["cpus and memory", "cpus"])
def test_one_node_bound_by_numactl(groups: tuple[NodeGroup, ...], bound: str) -> None:
    node = groups[1].nodes[0]
    memory = [f"--membind={node}"] if bound == "cpus and memory" else []
    found = report_under("numactl", f"--cpunodebind={node}", *memory)
    assert found["groups"] == [[node]]
    pages = {int(number): n for number, n in found["anonymous"].items()}
    assert pages[node] > 1000
    assert sum(n for number, n in pages.items() if number != node) == 0, pages


def test_memory_alone_bound_by_numactl(groups: tuple[NodeGroup, ...]) -> None:
    node = groups[1].nodes[0]
    found = report_under("numactl", f"--membind={node}", numa="shard")
    assert found["groups"] == [[node]]
    assert found["cpus"] == _core.usable_cpus()
    assert set(found["anonymous"]) == {str(node)}


def test_interleaving_by_numactl_is_left_alone(groups: tuple[NodeGroup, ...]) -> None:
    assert report_under("numactl", "--interleave=all")["mode"] == "off"
    assert report_under("numactl", "--interleave=all", numa="shard")["mode"] == "shard"


# ---- unequal nodes -------------------------------------------------------------------------------


def test_loads_on_whatever_nodes_there_are() -> None:
    # Also where a node has no CPUs, or less of them, or less memory.
    topology = _core.read_topology()
    bare = {node.id for node in topology.nodes if not node.usable}
    with load(small_model(), numa="shard") as model:
        model.generate(PROMPT, max_tokens=2, temperature=0)
        assert bare == {node for group in model.numa.groups for node in group.spare}
        report = model.placement_report(repair=False)
        assert report.local_share >= LOCAL
        assert not bare & set(report.node_bytes)


@pytest.mark.usefixtures("groups")
def test_a_full_node_gets_less() -> None:
    # Half of this model would not fit beside what is already there and what is left alone.
    path = small_model("tiny-v2", "f32", n_expert=96)
    half = path.stat().st_size // 2
    full = all_groups()[-1]  # as it is beside the file, which may lie in memory
    hog = _core.NodeMemory(full.free_bytes - half, list(full.nodes), "bind")
    np.frombuffer(hog, np.uint8)[:: _core.page_bytes()] = 1
    with load(path) as model:
        assert model.numa.mode == "shard"
        assert any("shared out by free memory" in note for note in model.notes)
        parts = model.placement_report(repair=False).parts
        assert all(part.local_share >= LOCAL for part in parts)
        assert parts[len(all_groups()) - 1].n_bytes < parts[0].n_bytes
