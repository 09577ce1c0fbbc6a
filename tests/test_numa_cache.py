"""The cache spread over nodes, and weight reads counted, with nodes that are made up."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mla_backend import Model, _core, model
from mla_backend.cache import BLOCK_CELLS, LatentCache
from mla_backend.cache_nodes import FreeBlocks, split_blocks
from mla_backend.errors import DeviceError
from mla_backend.memory import active_weight_bytes
from mla_backend.numa import MemoryShare, NodeGroup, NumaPlan
from mla_backend.weights import declare
from small_models import small_model

CPUS = _core.usable_cpus()
PAGE = _core.page_bytes()


def first_node() -> list[int]:
    return [node.id for node in _core.read_topology().nodes if node.may_allocate][:1]


def backend_on(*weights: int) -> _core.CpuBackend:
    nodes = [_core.NodeShare(first_node(), CPUS, weight) for weight in weights]
    return _core.CpuBackend(_core.ThreadPool(3, nodes=nodes))


def use_groups(monkeypatch: pytest.MonkeyPatch, *n_cores: int) -> None:
    groups = tuple(
        NodeGroup(tuple(first_node()), (), tuple(CPUS), cores, 1 << 30, 0) for cores in n_cores
    )
    plan = NumaPlan("shard" if len(groups) > 1 else "off", groups)
    monkeypatch.setattr(model, "plan_numa", lambda *_: plan)


# ---- blocks --------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    sequence=st.integers(0, 9),
    n_given_back=st.integers(0, 40),
)
def test_every_block_is_handed_out_once(sizes: list[int], sequence: int, n_given_back: int) -> None:
    begins = [0, *np.cumsum(sizes).tolist()]
    free = FreeBlocks(begins)
    everything = list(range(sum(sizes)))
    assert sorted(free) == everything
    taken = [free.take(sequence, i) for i in range(len(free))]
    assert sorted(taken) == everything
    assert not free
    for block in taken[:n_given_back]:
        free.give(block)
    again = [free.take(sequence, i) for i in range(len(free))]
    assert sorted(again) == sorted(taken[:n_given_back])


def test_one_group_hands_out_in_order() -> None:
    free = FreeBlocks([0, 100])
    assert [free.take(7, i) for i in range(100)] == list(range(100))


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [1, 1, 1, 1]])
def test_a_context_lies_on_all_nodes(weights: list[int]) -> None:
    begins = split_blocks(1024, weights, 64 * 1152)
    free = FreeBlocks(begins)
    blocks = [free.take(0, i) for i in range(512)]
    groups = [sum(begin <= block for begin in begins[1:-1]) for block in blocks]
    counts = Counter(groups)
    for i, weight in enumerate(weights):
        assert abs(counts[i] - 512 * weight / sum(weights)) <= 64
    changes = [i for i, (a, b) in enumerate(pairwise(groups), 1) if a != b]
    assert all(i % 32 == 0 for i in changes)  # 1/32 of the longest context


@pytest.mark.parametrize("block_bytes", [64 * 1152, 64 * 96, 64 * 10])
def test_parts_begin_with_pages(block_bytes: int) -> None:
    begins = split_blocks(4096, [3, 2, 1], block_bytes)
    assert all(begin * block_bytes % PAGE == 0 for begin in begins[:-1])
    assert split_blocks(3, [1, 1], block_bytes)[-1] == 3


# ---- cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, 1), (2, 0, 1), (1, 1, 1, 1)])
def test_cells_are_what_was_written(weights: tuple[int, ...]) -> None:
    with Model.load(small_model("tiny-v2"), n_ctx=64, device="cpu") as loaded:
        config = loaded.config
    plain = LatentCache(config, 20 * BLOCK_CELLS, backend=_core.CpuBackend(_core.ThreadPool(1)))
    spread = LatentCache(config, 20 * BLOCK_CELLS, backend=backend_on(*weights))
    rng = np.random.default_rng(3)
    cell_bytes = plain.bytes_per_position // config.n_layer
    data = rng.integers(0, 60, (config.n_layer, 900, cell_bytes), np.uint8)
    for cache in (plain, spread):
        first, second = cache.add(), cache.add()
        cache.write(first, data[:, :500])
        cache.write(second, data[:, 500:])
        cache.drop(first, 100, 130)
        cache.keep_last(second, 333)
        cache.shift(second, -20)
        child = cache.fork(first)
        cache.write(child, data[:, :3])
        parts = [cache.read(sequence) for sequence in (first, second, child)]
        if cache is plain:
            expected = parts
    for got, want in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_cells_lie_where_the_plan_says() -> None:
    try:
        _core.pages_by_node(_core.NodeMemory(PAGE, []))
    except DeviceError as error:
        pytest.skip(str(error))
    with Model.load(small_model("tiny-v2"), n_ctx=64, device="cpu") as loaded:
        config = loaded.config
    cache = LatentCache(config, 64 * BLOCK_CELLS, backend=backend_on(1, 1))
    sequence = cache.add()
    cell_bytes = cache.bytes_per_position // config.n_layer
    cache.write(sequence, np.ones((config.n_layer, 64 * BLOCK_CELLS, cell_bytes), np.uint8))
    assert len(cache.memory.parts) == 2 * config.n_layer
    for part in cache.memory.parts:
        assert part.begin % PAGE == part.end % PAGE == 0
        pages = _core.pages_by_node(part.memory, part.begin, part.end - part.begin)
        assert list(pages) == list(part.nodes)


def test_cells_follow_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with Model.load(small_model("tiny-v2"), n_ctx=64, device="cpu") as loaded:
        config = loaded.config
    node = first_node()[0]
    shares = [MemoryShare((node,), 3), MemoryShare((node,), 1, spare=(node + 1,))]
    asked: list[str] = []

    def refuse(memory: object, nodes: object, begin: int, n_bytes: int, policy: str) -> str:
        asked.append(policy)
        return "memory cannot be bound"

    monkeypatch.setattr(_core, "bind_memory", refuse)
    cache = LatentCache(config, 64 * BLOCK_CELLS, backend=backend_on(1, 1), shares=shares)
    sizes = [part.end - part.begin for part in cache.memory.parts[:2]]
    assert sizes[0] == pytest.approx(3 * sizes[1], rel=0.1)
    assert [part.nodes for part in cache.memory.parts[:2]] == [(node,), (node, node + 1)]
    # They are touched later, when a node may be full: nothing that ends the process then.
    assert set(asked) == {"prefer"}
    assert cache.memory.refusals == ["memory cannot be bound"]


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_long_contexts_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, attention: str, precision: str
) -> None:
    path = small_model("tiny-v3", "q4_k_m", n_layer=2)
    ids = np.random.default_rng(5).integers(3, 200, 700).tolist()
    expected: list[bytes] | None = None
    for n_cores in ((1,), (1, 1), (2, 1, 1, 3)):
        use_groups(monkeypatch, *n_cores)
        for threads in (1, 4):
            with Model.load(
                path,
                n_ctx=768,
                threads=threads,
                attention=attention,
                precision=precision,
                device="cpu",
            ) as loaded:
                session = loaded.session()
                got = [session.feed(ids[:690]).tobytes()]
                got += [session.feed([token]).tobytes() for token in ids[690:]]
            expected = expected or got
            assert got == expected, (n_cores, threads)


@pytest.mark.parametrize(
    ("shape", "layout"), [("tiny-v2", "split"), ("tiny-v2", "legacy"), ("tiny-v3", "split")]
)
@pytest.mark.parametrize("n_cores", [(1,), (1, 1)])
def test_all_that_is_read_is_counted(
    monkeypatch: pytest.MonkeyPatch, shape: str, layout: str, n_cores: tuple[int, ...]
) -> None:
    """A token reads every matrix once, and of the experts those that it uses."""
    try:
        _core.pages_by_node(_core.NodeMemory(PAGE, []))
    except DeviceError as error:
        pytest.skip(str(error))
    use_groups(monkeypatch, *n_cores)
    path = small_model(shape, "q8_0", layout)
    with Model.load(path, n_ctx=64, threads=3, attention="absorbed", device="cpu") as loaded:
        config = loaded.config
        sizes = {info.name: info.n_bytes for info in loaded.file.tensors.values()}
        roles = ("linear", "experts", "router", "k_b", "v_b", "kv_b")
        products = {spec.name for spec in declare(config) if spec.role in roles}
        session = loaded.session()
        session.feed([1, 2, 3])
        with loaded.counting_reads() as traffic:
            session.feed([4])
        assert traffic.n_bytes == active_weight_bytes(
            config, {name: n for name, n in sizes.items() if name in products}
        )
        assert sum(sum(n.values()) for n in traffic.by_thread.values()) == traffic.n_bytes
        if len(_core.read_topology().nodes) == 1:
            assert traffic.remote_bytes == 0
        session.feed([5])
        assert loaded._backend.take_reads() == []
