"""Weights read onto nodes: the same bits come out, however many nodes are made up."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mla_backend import Model, _core, loading, model, node_loading, planning
from mla_backend.config import config_from_gguf
from mla_backend.errors import DeviceError, MemoryLimitError, UsageError
from mla_backend.gguf import read_gguf
from mla_backend.loading import LoadOptions
from mla_backend.numa import NodeGroup, NumaPlan
from mla_backend.placement import everything_on
from mla_backend.weights import check as check_weights
from mla_backend.weights import declare
from small_models import small_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
GIB = 1 << 30
MakeUp = Callable[..., None]


def first_node() -> tuple[int, ...]:
    nodes = [node.id for node in _core.read_topology().nodes if node.may_allocate]
    return tuple(nodes[:1])


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MakeUp:
    """Makes ``Model.load`` see groups of so many cores, all of which are the same node."""

    def use(*n_cores: int, mode: str = "shard", free_bytes: int = GIB) -> None:
        cpus = tuple(_core.usable_cpus())
        groups = tuple(NodeGroup(first_node(), (), cpus, cores, free_bytes, 0) for cores in n_cores)
        plan = NumaPlan(mode, groups)  # type: ignore[arg-type]
        monkeypatch.setattr(model, "plan_numa", lambda *_: plan)

    return use


def logits(path: Path, **options: Any) -> bytes:
    with Model.load(path, n_ctx=64, device="cpu", **options) as loaded:
        return loaded.logits(PROMPT).tobytes()


@pytest.mark.parametrize(
    ("shape", "type", "layout", "changes"),
    [
        ("tiny-v2", "f32", "split", {}),
        ("tiny-v2", "q4_k", "split", {"tied": True}),
        ("tiny-v3", "q8_0", "split", {}),
        ("tiny-v2", "bf16", "legacy", {}),
    ],
)
def test_same_bits(
    made_up: MakeUp, shape: str, type: str, layout: str, changes: dict[str, Any]
) -> None:
    path = small_model(shape, type, layout, **changes)
    expected = logits(path, numa="off")
    for n_cores in ((1,), (1, 1), (3, 1), (1, 2, 1, 1)):
        for threads in (1, 3):
            made_up(*n_cores)
            assert logits(path, numa="shard", threads=threads) == expected, n_cores
    made_up(1, 1, mode="interleave")
    assert logits(path, numa="interleave") == expected


def test_split_files(made_up: MakeUp) -> None:
    path = small_model("tiny-v2", "q8_0", shards=3)
    expected = logits(small_model("tiny-v2", "q8_0"), numa="off")
    made_up(2, 1)
    assert logits(path, numa="shard") == expected


@pytest.mark.parametrize("free_bytes", [0, GIB])
def test_past_the_page_cache(
    made_up: MakeUp, monkeypatch: pytest.MonkeyPatch, free_bytes: int
) -> None:
    path = small_model()
    expected = logits(path, numa="off")
    made_up(1, 1)
    asked: list[bool] = []
    read = _core.read_in_parallel

    def spy(paths: Any, teams: Any, bypass_cache: bool, progress: Any) -> Any:
        asked.append(bypass_cache)
        return read(paths, teams, bypass_cache, progress)

    monkeypatch.setattr(_core, "read_in_parallel", spy)
    once = path.stat().st_size
    monkeypatch.setattr(
        node_loading, "cannot_hold_twice", lambda n: n > once // 2 and not free_bytes
    )
    assert logits(path, numa="shard") == expected
    assert asked == [free_bytes == 0]


def test_sessions_know_the_model_again(made_up: MakeUp, tmp_path: Path) -> None:
    path = small_model("tiny-v3", "q4_k")
    with Model.load(path, n_ctx=64, numa="off", device="cpu") as mapped:
        mapped.generate(PROMPT, max_tokens=3, temperature=0)
        mapped.save_session(tmp_path / "saved")
    made_up(2, 1)
    with Model.load(path, n_ctx=64, numa="shard", device="cpu") as placed:
        placed.load_session(tmp_path / "saved")


def test_what_is_said_of_it(made_up: MakeUp) -> None:
    made_up(1, 1)
    path = small_model()
    seen: dict[str, list[tuple[int, int]]] = {}

    def progress(phase: str, done: int, total: int) -> None:
        seen.setdefault(phase, []).append((done, total))

    with Model.load(path, n_ctx=64, numa="shard", device="cpu", on_progress=progress) as loaded:
        assert loaded.numa.mode == "shard"
        assert [load.n_bytes for load in loaded.loaded] == [
            total for _, total in seen[f"load node {first_node()[0]}"][-2:]
        ]
        assert seen["load"][-1][0] == seen["load"][-1][1] > 0
        memory = loaded.memory
        assert memory.weights_mapped_bytes == 0
        assert memory.weights_copied_bytes >= sum(load.n_bytes for load in loaded.loaded)
        assert "GB/s" in loaded.loaded[0].text


def test_where_it_lies(made_up: MakeUp) -> None:
    made_up(1, 1)
    with Model.load(small_model(), n_ctx=64, numa="shard", device="cpu") as loaded:
        try:
            report = loaded.placement_report()
        except DeviceError as error:
            pytest.skip(str(error))
        assert report.n_strays == 0
        assert report.local_share == 1.0
        assert set(report.node_bytes) == set(first_node())


def test_systems_that_refuse_to_bind(made_up: MakeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(1, 1)
    allocate = _core.NodeMemory

    class Unbound:
        """As in a container without the right: the memory is there, and says so."""

        def __new__(cls, n_bytes: int, nodes: Any, policy: str = "bind") -> Any:
            memory = allocate(n_bytes, [], policy)
            assert n_bytes == 0 or "first touched" in memory.note
            return memory

    monkeypatch.setattr(_core, "NodeMemory", Unbound)
    monkeypatch.setattr(_core, "bind_memory", lambda *_: "cells cannot be bound")
    with Model.load(small_model(), n_ctx=64, numa="shard", device="cpu") as loaded:
        assert [note for note in loaded.notes if note.startswith("numa: ")] == [
            "numa: no node was given: it lies where it is first touched",
            "numa: cells cannot be bound",
        ]


def test_strays_that_stay_are_told(made_up: MakeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(1, 1)
    pages = {first_node()[0]: 90, first_node()[0] + 1: 10}
    monkeypatch.setattr(_core, "pages_by_node", lambda *_: pages)
    monkeypatch.setattr(_core, "move_strays", lambda *_: 2)
    with Model.load(small_model(), n_ctx=64, numa="shard", device="cpu") as loaded:
        assert any("8.0 % of the weights of node" in note for note in loaded.notes)

    def refuse(*_: Any) -> Any:
        raise DeviceError("NUMA: the system does not tell the nodes of pages")

    monkeypatch.setattr(_core, "pages_by_node", refuse)
    with Model.load(small_model(), n_ctx=64, numa="shard", device="cpu") as loaded:
        assert any("cannot be verified" in note for note in loaded.notes)


def test_too_little_memory(made_up: MakeUp) -> None:
    path = small_model()
    made_up(1, 1, free_bytes=1 << 10)
    with pytest.raises(MemoryLimitError, match="do not fit into the memory of the NUMA nodes"):
        Model.load(path, n_ctx=64, numa="shard", device="cpu")
    with Model.load(path, n_ctx=64, device="cpu") as loaded:
        assert loaded.numa.mode == "off"
        assert any("weights are not placed" in note for note in loaded.notes)


def test_cache_and_workspace_count(made_up: MakeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that fit as copies, but not beside the rest, stay mapped unless they must not."""
    path = small_model("tiny-v2", "f32", n_expert=96)
    made_up(1, 1)
    weights = path.stat().st_size
    with Model.load(path, n_ctx=4096, n_batch=512, device="cpu") as loaded:
        cache, workspace = loaded.memory.cache_bytes, loaded.memory.workspace_bytes
        assert loaded.numa.mode == "shard"
    assert cache + workspace < weights
    for room in (weights + cache // 2, weights + cache + workspace // 2):
        monkeypatch.setattr(_core, "available_memory_bytes", lambda room=room: room)
        with Model.load(path, n_ctx=4096, n_batch=512, device="cpu") as loaded:
            assert loaded.numa.mode == "off"
            assert loaded.memory.weights_copied_bytes < weights // 2
            assert sum("weights are not placed" in note for note in loaded.notes) == 1
        with pytest.raises(MemoryLimitError):
            Model.load(path, n_ctx=4096, n_batch=512, numa="shard", device="cpu")


def test_more_workspace_than_was_thought(made_up: MakeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_model("tiny-v2", "f32", n_expert=96)
    made_up(1, 1)
    weights = path.stat().st_size
    monkeypatch.setattr(_core, "available_memory_bytes", lambda: 4 * weights)
    monkeypatch.setattr(planning, "planned_bytes", lambda *_, **__: (7 * weights // 2, 0))
    with Model.load(path, n_ctx=64, threads=2, device="cpu") as loaded:
        assert loaded.numa.mode == "off"
        assert "copied weights" in loaded.notes[-1]
    with pytest.raises(MemoryLimitError, match="copied weights"):
        Model.load(path, n_ctx=64, numa="shard", device="cpu")


def test_wrong_values() -> None:
    with pytest.raises(UsageError, match="numa 'mirror'; accepted are auto, shard"):
        Model.load(small_model(), numa="mirror")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no node 99"):
        Model.load(small_model(), numa_nodes="99")


def test_nodes_without_a_share(made_up: MakeUp) -> None:
    """A node so small, or so full, that no row falls to it."""
    path = small_model("tiny-v2", "q8_0")
    expected = logits(path, numa="off")
    made_up(10000, 1)
    assert logits(path, numa="shard") == expected


def test_a_part_of_no_bytes_may_begin_anywhere() -> None:
    memory, nothing = _core.NodeMemory(64, []), _core.NodeMemory(0, [])
    whole = _core.Tensor.sliced("F32", [4, 4], 0, [0, 4, 4], [(memory, 0), (nothing, 0)])
    assert whole.shape == [4, 4]
    odd = np.zeros(65, np.uint8)[1:1]
    assert _core.Tensor.sliced("F32", [4, 4], 0, [0, 4, 4], [(memory, 0), (odd, 0)]).shape == [4, 4]


@pytest.mark.parametrize("twice", [True, False])
def test_files_read_whole_leave_the_page_cache_alone(
    monkeypatch: pytest.MonkeyPatch, twice: bool
) -> None:
    path = small_model("tiny-v2", "q8_0", shards=3)
    expected = logits(path, numa="off")
    size = sum(part.stat().st_size for part in path.parent.glob("*.gguf"))
    asked: list[bool] = []
    read = _core.LoadedFile

    def spy(path: str, threads: int, progress: Any, bypass_cache: bool = False) -> Any:
        asked.append(bypass_cache)
        return read(path, threads, progress, bypass_cache)

    monkeypatch.setattr(_core, "LoadedFile", spy)
    monkeypatch.setattr(loading, "cannot_hold_twice", lambda n: 0 < n <= size and not twice)
    assert logits(path, numa="off", mmap=False) == expected
    assert asked == [not twice] * 3


def test_a_file_that_is_gone_or_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copyfile(small_model("tiny-v2", "q8_0"), path)
    file = read_gguf(path)
    config = config_from_gguf(file)
    infos = check_weights(config, file)
    groups = [NodeGroup(first_node(), (), (0,), 1, GIB, 0) for _ in range(2)]
    nodes = NumaPlan("shard", tuple(groups), weights=(1, 1))
    os.truncate(path, max(info.offset for info in infos.values()))
    for problem in ("ends within the tensor", "No such file"):
        with pytest.raises(DeviceError, match=rf"model\.gguf: .*{problem}"):
            node_loading.load_on_nodes(
                file, infos, config, nodes, everything_on(config, "cpu"), LoadOptions()
            )
        path.unlink(missing_ok=True)


def test_parts_are_whole() -> None:
    """Every row belongs to one part, heads are not cut, and expert rows are multiples of 16."""
    config = config_from_gguf(read_gguf(small_model("tiny-v3")))
    for spec in declare(config):
        split = node_loading.split_tensor(spec.role, spec.shape, [5, 3, 1], config)
        if spec.role in ("norm", "router_bias", "embedding"):
            assert split is None
            continue
        assert split is not None
        assert split.axis == (1 if spec.role == "experts" else 0)
        assert split.begins[0] == 0
        assert split.begins[-1] == spec.shape[split.axis]
        assert all(a <= b for a, b in itertools.pairwise(split.begins))
        if spec.role in ("linear", "experts"):
            assert all(begin % 16 == 0 for begin in split.begins[:-1])
