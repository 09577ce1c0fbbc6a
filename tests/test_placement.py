"""What goes where: examples of every option, and budgets that are never exceeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mla_backend.config import ModelConfig, config_from_gguf
from mla_backend.errors import UsageError
from mla_backend.gguf import read_gguf
from mla_backend.placement import CPU, Placement, PlacementOptions, Room, fitting_context, place
from small_models import small_model

MIB = 1 << 20
GIB = 1 << 30
SPARE = 768 * MIB  # kept free on each device, beside the workspace
WORKSPACE = 100 * MIB
CACHE = 6 * MIB  # all layers of six

Sizes = dict[str, int]


@cache
def _any_config() -> ModelConfig:
    return config_from_gguf(read_gguf(small_model()))


def make_config(n_layer: int = 6, n_dense: int = 1, *, tied: bool = False) -> ModelConfig:
    moe = _any_config().moe if n_dense < n_layer else None
    return replace(
        _any_config(), n_layer=n_layer, n_layer_dense=n_dense, tied_embeddings=tied, moe=moe
    )


def make_sizes(config: ModelConfig, layer: int, experts: int, ends: int) -> Sizes:
    """Bytes by name: of each layer in two tensors, of its experts in two, of both ends."""
    sizes = {"token_embd.weight": ends, "output_norm.weight": 8}
    if not config.tied_embeddings:
        sizes["output.weight"] = ends
    for i in range(config.n_layer):
        sizes[f"blk.{i}.attn_norm.weight"] = 16
        sizes[f"blk.{i}.attn_output.weight"] = layer
        if i >= config.n_layer_dense:
            sizes[f"blk.{i}.ffn_gate_exps.weight"] = experts // 2
            sizes[f"blk.{i}.ffn_down_exps.weight"] = experts - experts // 2
    return sizes


def rooms_for(*planned: int) -> list[Room]:
    """GPUs of which so many bytes are planned with, for weights and cache."""
    return [
        Room(f"cuda:{i}", -(-(n + SPARE + WORKSPACE) * 100 // 96) + 1)
        for i, n in enumerate(planned)
    ]


def placed(config: ModelConfig, sizes: Sizes, rooms: Sequence[Room], **options: Any) -> Placement:
    return place(
        config,
        sizes,
        rooms,
        PlacementOptions(**options),
        cache_bytes=CACHE * config.n_layer // 6,
        workspace_bytes=WORKSPACE,
    )


def bytes_on(placement: Placement, config: ModelConfig, sizes: Sizes) -> dict[str, int]:
    """What each device holds: its weights, its part of the cache, a tied output matrix."""
    held: dict[str, int] = {}
    for name, n_bytes in sizes.items():
        device = placement.of(name)
        held[device] = held.get(device, 0) + n_bytes
    for device in placement.layers:
        held[device] = held.get(device, 0) + CACHE // 6
    if config.tied_embeddings and placement.output != placement.layers[0]:
        held[placement.output] += sizes["token_embd.weight"]
    return held


LAYER, EXPERTS, ENDS = 10 * MIB, 100 * MIB, 20 * MIB
CONFIG = make_config()
SIZES = make_sizes(CONFIG, LAYER, EXPERTS, ENDS)
ALL = sum(SIZES.values()) + CACHE


# ---- made to fit ---------------------------------------------------------------------------------


def test_everything_fits() -> None:
    placement = placed(CONFIG, SIZES, rooms_for(ALL))
    assert placement.layers == placement.experts == ("cuda:0",) * 6
    assert placement.output == "cuda:0"
    assert placement.uses_devices
    assert {placement.of(name) for name in SIZES} == {"cuda:0"}
    assert placement.text() == "cuda:0: 6 of 6 layers and the output"


def test_one_byte_less_sends_experts_away_first() -> None:
    placement = placed(CONFIG, SIZES, rooms_for(ALL - 64))
    assert placement.layers == ("cuda:0",) * 6
    assert placement.experts == ("cuda:0", CPU, *("cuda:0",) * 4)
    assert placement.of("blk.1.ffn_gate_exps.weight") == CPU
    assert placement.of("blk.1.attn_norm.weight") == "cuda:0"
    assert placement.text() == ("cuda:0: 6 of 6 layers and the output, experts of 1 in host memory")


def test_layers_leave_once_no_experts_are_left() -> None:
    room = 3 * (LAYER + CACHE // 6) + ENDS + 1000
    placement = placed(CONFIG, SIZES, rooms_for(room))
    assert placement.layers == (CPU,) * 3 + ("cuda:0",) * 3
    assert placement.experts == (CPU,) * 6
    assert placement.output == "cuda:0"
    assert placement.of("token_embd.weight") == CPU
    assert placement.text() == (
        "cpu: 3 of 6 layers; cuda:0: 3 of 6 layers and the output, experts of 3 in host memory"
    )


@pytest.mark.parametrize("rooms", [[], rooms_for(0), rooms_for(ENDS), [Room("cuda:0", 0)]])
def test_nothing_fits(rooms: list[Room]) -> None:
    placement = placed(CONFIG, SIZES, rooms)
    assert placement.layers == placement.experts == (CPU,) * 6
    assert placement.output == CPU
    assert not placement.uses_devices
    assert placement.text() == "cpu: 6 of 6 layers and the output"


def test_without_experts() -> None:
    dense = make_config(n_dense=6)
    sizes = make_sizes(dense, LAYER, 0, ENDS)
    room = 2 * (LAYER + CACHE // 6) + ENDS + 1000
    placement = placed(dense, sizes, rooms_for(room))
    assert placement.layers == placement.experts == (CPU,) * 4 + ("cuda:0",) * 2
    assert placed(dense, sizes, rooms_for(GIB), cpu_moe=True).experts == ("cuda:0",) * 6


def test_a_tied_output_counts_where_it_is() -> None:
    tied = make_config(tied=True)
    sizes = make_sizes(tied, LAYER, EXPERTS, ENDS)
    room = LAYER + CACHE // 6 + ENDS + 1000
    assert placed(tied, sizes, rooms_for(room)).layers == (CPU,) * 5 + ("cuda:0",)
    assert placed(tied, sizes, rooms_for(room - ENDS)).layers == (CPU,) * 6


# ---- as the user says ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "on_gpu", "output"), [(0, 0, CPU), (1, 1, CPU), (6, 6, CPU), (7, 6, "cuda:0")]
)
def test_gpu_layers(n: int, on_gpu: int, output: str) -> None:
    """The last layers, experts included, whether they fit or not; one more is the output."""
    for room in (0, GIB):
        placement = placed(CONFIG, SIZES, rooms_for(room), gpu_layers=n)
        assert placement.layers == placement.experts == (CPU,) * (6 - on_gpu) + ("cuda:0",) * on_gpu
        assert placement.output == output


def test_cpu_moe() -> None:
    """Dense layers have no experts to keep back; all the room is the layers'."""
    for gpu_layers in (None, 99):
        room = rooms_for(6 * (LAYER + CACHE // 6) + 2 * ENDS + 1000)
        placement = placed(CONFIG, SIZES, room, cpu_moe=True, gpu_layers=gpu_layers)
        assert placement.layers == ("cuda:0",) * 6
        assert placement.experts == ("cuda:0", *(CPU,) * 5)
        assert placement.output == "cuda:0"
        assert "experts of 5 in host memory" in placement.text()


def test_overrides_come_first_and_give_their_room_to_others() -> None:
    away = [(r"blk\.[2-5]\.ffn_.*_exps", CPU), (r"blk\.2\.", "cuda:0")]
    room = rooms_for(ALL - 4 * EXPERTS)
    placement = placed(CONFIG, SIZES, room, override_tensor=away)
    assert placement.layers == placement.experts == ("cuda:0",) * 6
    assert placement.of("blk.2.ffn_down_exps.weight") == CPU
    assert placement.of("blk.2.attn_norm.weight") == "cuda:0"
    assert placement.of("blk.1.ffn_down_exps.weight") == "cuda:0"


def test_an_override_takes_room_on_its_device() -> None:
    room = rooms_for(ENDS + LAYER + CACHE // 6 + 1000)
    alone = placed(CONFIG, SIZES, room)
    assert alone.layers.count("cuda:0") == 1
    beside = placed(CONFIG, SIZES, room, override_tensor=[(r"blk\.1\.ffn_down", "cuda:0")])
    assert beside.layers.count("cuda:0") == 0
    assert beside.of("blk.1.ffn_down_exps.weight") == "cuda:0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"override_tensor": [("exps", "cuda:1")]}, "exps=cuda:1: the devices here are cpu, cuda"),
        ({"override_tensor": [("(", CPU)]}, "is no regular expression"),
        ({"tensor_split": [1.0]}, "one part, 0 or more, for each of 2 GPUs"),
        ({"tensor_split": [1.0, -1.0]}, "0 or more"),
        ({"tensor_split": [0.0, 0.0]}, "0 or more"),
        ({"tensor_split": [float("nan"), 1.0]}, "0 or more"),
        ({"gpu_layers": -1}, "gpu_layers is -1, accepted is 0 or more"),
    ],
)
def test_options_without_sense(options: dict[str, Any], message: str) -> None:
    rooms = [Room("cuda:0", GIB), Room("cuda:2", GIB)]
    with pytest.raises(UsageError, match=message):
        placed(CONFIG, SIZES, rooms, **options)


# ---- two GPUs ------------------------------------------------------------------------------------


def test_the_first_gpu_is_filled_first() -> None:
    assert set(placed(CONFIG, SIZES, rooms_for(ALL, ALL)).layers) == {"cuda:0"}
    both = placed(CONFIG, SIZES, rooms_for(ALL // 2 + EXPERTS // 2, ALL))
    assert both.experts == both.layers == ("cuda:0",) * 3 + ("cuda:1",) * 3
    assert both.text() == "cuda:0: 3 of 6 layers; cuda:1: 3 of 6 layers and the output"


def test_layers_that_come_out_in_no_equal_parts_still_fit() -> None:
    """Two layers fit on either GPU, and not three: halves by bytes would overfill the first."""
    dense = make_config(4, n_dense=4)
    sizes = make_sizes(dense, 3 * LAYER, 0, 0)
    each = 3 * LAYER + CACHE // 6
    placement = placed(dense, sizes, rooms_for(3 * each - 100, 2 * each + 1000))
    assert placement.layers == ("cuda:0",) * 2 + ("cuda:1",) * 2


def test_tensor_split() -> None:
    for gpu_layers in (None, 99):
        for parts, n in (((1, 1), 3), ((2, 1), 4), ((1, 0), 6), ((0, 3), 0)):
            placement = placed(
                make_config(n_dense=6),
                make_sizes(make_config(n_dense=6), LAYER, 0, 0),
                rooms_for(ALL, ALL),
                tensor_split=parts,
                gpu_layers=gpu_layers,
            )
            assert placement.layers == ("cuda:0",) * n + ("cuda:1",) * (6 - n)
            assert placement.output == placement.layers[-1]


def test_a_full_gpu_is_left_out() -> None:
    placement = placed(CONFIG, SIZES, [Room("cuda:0", 0), *rooms_for(0, ALL)[1:]])
    assert placement.layers == placement.experts == ("cuda:1",) * 6


# ---- any model on any GPUs -----------------------------------------------------------------------


@given(
    n_layer=st.integers(1, 12),
    n_dense=st.integers(0, 12),
    tied=st.booleans(),
    layer=st.integers(0, 300 * MIB),
    experts=st.integers(0, 2 * GIB),
    ends=st.integers(0, 500 * MIB),
    free=st.lists(st.integers(0, 12 * GIB), min_size=1, max_size=4),
    cpu_moe=st.booleans(),
    data=st.data(),
)
def test_budgets_are_kept(
    n_layer: int,
    n_dense: int,
    tied: bool,
    layer: int,
    experts: int,
    ends: int,
    free: list[int],
    cpu_moe: bool,
    data: st.DataObject,
) -> None:
    config = make_config(n_layer, min(n_dense, n_layer), tied=tied)
    sizes = make_sizes(config, layer, experts, ends)
    rooms = [Room(f"cuda:{i}", n) for i, n in enumerate(free)]
    part = st.floats(0.01, 10)
    split = data.draw(st.none() | st.lists(part, min_size=len(free), max_size=len(free)))
    placement = place(
        config,
        sizes,
        rooms,
        PlacementOptions(cpu_moe=cpu_moe, tensor_split=split),
        cache_bytes=CACHE // 6 * n_layer,
        workspace_bytes=WORKSPACE,
    )
    held = bytes_on(placement, config, sizes)
    for room in rooms:
        if held.get(room.name):
            assert held[room.name] + SPARE + WORKSPACE <= room.free_bytes
    # The CPU's layers come first, then each GPU's, in the order of the GPUs.
    order = {CPU: -1} | {room.name: i for i, room in enumerate(rooms)}
    assert list(placement.layers) == sorted(placement.layers, key=order.__getitem__)
    # Experts are on their layer's device or in host memory; the output is where the last layer is.
    for at, of_experts in zip(placement.layers, placement.experts, strict=True):
        assert of_experts in (at, CPU)
    assert placement.output == placement.layers[-1]
    # No layer stays behind while all of a model fits on one GPU.
    if max(free) * 96 // 100 - SPARE - WORKSPACE >= sum(held.values()) + ends and split is None:
        assert CPU not in placement.layers
        assert cpu_moe or CPU not in placement.experts


@given(
    weights=st.integers(0, 20 * GIB),
    free=st.lists(st.integers(0, 12 * GIB), min_size=1, max_size=3),
    position=st.integers(100, 100_000),
)
def test_fitting_context(weights: int, free: list[int], position: int) -> None:
    rooms = [Room(f"cuda:{i}", n) for i, n in enumerate(free)]
    n_ctx = fitting_context(CONFIG, weights, rooms, position)
    assert min(8192, CONFIG.n_ctx_train) <= n_ctx <= CONFIG.n_ctx_train
    if n_ctx > 8192:
        assert weights + n_ctx * position <= sum(free)
