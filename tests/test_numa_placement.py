"""Weights on nodes beside GPUs, which are made up: nothing of it needs one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mla_backend import _core, node_loading, planning
from mla_backend.cache import LatentCache
from mla_backend.config import ModelConfig, config_from_gguf
from mla_backend.errors import MemoryLimitError
from mla_backend.gguf import TensorInfo, read_gguf
from mla_backend.loading import LoadOptions, Weights
from mla_backend.models.deepseek import build_graph
from mla_backend.models.inputs import BatchShape
from mla_backend.numa import NodeGroup, NumaPlan
from mla_backend.placement import CPU, Placement, PlacementOptions, Room, place
from mla_backend.threads import Defaults
from mla_backend.weights import check as check_weights
from mla_backend.weights import declare
from small_models import small_model

GPU = "cuda:0"
ROOMY = 1 << 40
WISHES = [
    PlacementOptions(),
    PlacementOptions(cpu_moe=True),
    PlacementOptions(gpu_layers=1),
    PlacementOptions(gpu_layers=99, override_tensor=[("ffn_(up|down)_exps", CPU)]),
    PlacementOptions(override_tensor=[("ffn_(up|gate)_exps", CPU)]),
    PlacementOptions(override_tensor=[("ffn", CPU)]),
    PlacementOptions(override_tensor=[("attn", CPU)]),
    PlacementOptions(override_tensor=[(r"blk\.1\.", CPU)]),
    PlacementOptions(override_tensor=[("token_embd", CPU)]),
    PlacementOptions(override_tensor=[("output", CPU)]),
]
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("tiny-v2", "split", {}),
    ("tiny-v2", "legacy", {"tied": True}),
    ("tiny-v3", "split", {}),
]


def first_node() -> tuple[int, ...]:
    nodes = [node.id for node in _core.read_topology().nodes if node.may_allocate]
    return tuple(nodes[:1])


def two_groups(free_bytes: int) -> tuple[NodeGroup, ...]:
    return tuple(NodeGroup(first_node(), (), (0,), 1, free_bytes, 0) for _ in range(2))


def read(path: Path) -> tuple[Any, ModelConfig, dict[str, TensorInfo]]:
    file = read_gguf(path)
    config = config_from_gguf(file)
    return file, config, check_weights(config, file)


def placed(
    config: ModelConfig, infos: dict[str, TensorInfo], wishes: PlacementOptions
) -> Placement:
    sizes = {name: info.n_bytes for name, info in infos.items()}
    return place(config, sizes, [Room(GPU, ROOMY)], wishes, cache_bytes=0, workspace_bytes=0)


class Readers:
    """Weights that keep a record of where they are read, as a graph is built of them."""

    def __init__(self, weights: Weights, placement: Placement) -> None:
        self._weights, self._placement = weights, placement
        self._now = ""
        self.of: dict[str, set[str]] = {}

    def place(self, name: str) -> str:
        self._now = self._placement.of(name)
        return self._now

    def __getitem__(self, name: str) -> _core.Tensor:
        self.of.setdefault(name, set()).add(self._now)
        return self._weights[name]

    def __contains__(self, name: str) -> bool:
        return name in self._weights


@pytest.mark.parametrize("wishes", WISHES)
@pytest.mark.parametrize(("shape", "layout", "changes"), MODELS)
def test_only_what_the_cpu_reads_is_cut(
    shape: str, layout: str, changes: dict[str, Any], wishes: PlacementOptions
) -> None:
    file, config, infos = read(small_model(shape, "f32", layout, **changes))
    placement = placed(config, infos, wishes)
    sources = [_core.MappedFile(str(path)) for path in file.paths]
    readers = Readers(Weights.of_sources(file, infos, sources, mapped=True), placement)
    cache = LatentCache(config, 64, backend=_core.CpuBackend(_core.ThreadPool(1)))
    build_graph(config, readers, cache.layout, BatchShape(1, 1, 1), "fast", None, readers.place)
    if config.tied_embeddings:  # the node of the embedding, once more
        readers.of["token_embd.weight"].add(placement.of("output.weight"))
    plan = NumaPlan("shard", two_groups(ROOMY), weights=(1, 1))
    placer = node_loading._Placer(file, plan, config)
    for spec in declare(config):
        placer.place(spec.name, infos[spec.name], spec.role, placement)
        cut = isinstance(placer._places[spec.name][0], node_loading.Split)
        on_cpu = readers.of[spec.name] | {placement.of(spec.name)} == {CPU}
        splits = node_loading.split_tensor(spec.role, spec.shape, (1, 1), config) is not None
        assert cut == (on_cpu and splits), (spec.name, readers.of[spec.name])


@pytest.mark.parametrize("mmap", [True, False])
def test_the_rest_comes_as_the_user_asked(mmap: bool) -> None:
    file, config, infos = read(small_model("tiny-v2", "q8_0"))
    placement = placed(config, infos, PlacementOptions(cpu_moe=True))
    plan = NumaPlan("shard", two_groups(ROOMY), weights=(1, 1))
    weights = node_loading.load_on_nodes(
        file, infos, config, plan, placement, LoadOptions(mmap=mmap)
    )
    elsewhere = sum(info.n_bytes for name, info in infos.items() if placement.of(name) != CPU)
    assert elsewhere > 0
    assert weights.mapped_bytes == (elsewhere if mmap else 0)
    everything = sum(info.n_bytes for info in infos.values())
    assert (weights.copied_bytes >= everything) == (not mmap)
    for name in ("output.weight", "blk.1.attn_output.weight"):
        source = _core.MappedFile(str(file.paths[0]))
        info = infos[name]
        whole = _core.Tensor(source, info.format, info.shape, offset_bytes=info.offset)
        assert weights[name].view().tobytes() == whole.view().tobytes()


class Gpu:
    """One that is not there, with room."""

    name = GPU

    def free_bytes(self) -> int:
        return ROOMY


def plan_with_gpu(
    path: Path,
    wishes: PlacementOptions,
    *,
    free_bytes: int,
    **options: Any,
) -> planning.LoadPlan:
    file, config, infos = read(path)
    gpu: Any = Gpu()
    return planning.LoadPlan(
        file,
        config,
        infos,
        "f16",
        64,
        None,
        LoadOptions(**options),
        gpus=[gpu],
        wishes=wishes,
        n_batch=1,
        numa=NumaPlan("shard", two_groups(free_bytes)),
        must_place=True,
        choose_defaults=lambda nodes: Defaults(1, None, ""),
    )


def test_what_goes_to_gpus_needs_no_room_on_nodes() -> None:
    path = small_model("tiny-v2", "f32", n_expert=96)
    room = (32 << 20) + (1 << 20)  # of which a part is left alone
    everything = plan_with_gpu(path, PlacementOptions(), free_bytes=room)
    assert (everything.numa.mode, everything.placed_bytes) == ("shard", 0)
    with pytest.raises(MemoryLimitError):
        plan_with_gpu(path, PlacementOptions(cpu_moe=True), free_bytes=room)
    # Read instead of mapped, all of it is host memory first.
    with pytest.raises(MemoryLimitError):
        plan_with_gpu(path, PlacementOptions(), free_bytes=room, mmap=False)
