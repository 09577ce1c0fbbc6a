"""What goes where: each layer, its experts, the embedding and the output to one device.

A layer's cache lies where its attention is computed. Where memory is short, experts leave the GPU
first: they are most of the bytes, and few of them are read for a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from mla_backend.config import ModelConfig
from mla_backend.errors import UsageError

CPU: Final = "cpu"
_LAYER = re.compile(r"blk\.(\d+)\.")
_EXPERTS = "_exps."
_GIB: Final = 1 << 30
#: Kept free on each device: scratch of dequantized weights (at most 2 x 256 MiB), kernels, recorded
#: graphs.
_SPARE_BYTES: Final = 3 * _GIB // 4
#: Part of a device's free memory that is planned with; other programs take some too.
_SHARE: Final = 0.96
_LEAST_CTX: Final = 8192


@dataclass(frozen=True)
class Room:
    """Free bytes of one device."""

    name: str
    free_bytes: int


@dataclass(frozen=True)
class PlacementOptions:
    """What the user decides; the rest is made to fit.

    Attributes:
        gpu_layers: how many of the last layers go to GPUs (more than there are: the output too);
            None: as many as fit.
        cpu_moe: experts stay in host memory.
        override_tensor: (regular expression, device) pairs; the first that is found in a tensor's
            name decides.
        tensor_split: parts of the layers per GPU; None: the first one is filled first.
    """

    gpu_layers: int | None = None
    cpu_moe: bool = False
    override_tensor: Sequence[tuple[str, str]] = ()
    tensor_split: Sequence[float] | None = None


@dataclass(frozen=True)
class Placement:
    """Devices by name.

    Attributes:
        layers: of attention, norms, dense and shared feed-forward, and the cache.
        experts: of the routed experts, layer by layer.
        output: of the output norm and matrix. The embedding lies where layer 0 does.
        overrides: compiled ``override_tensor``.
    """

    layers: tuple[str, ...]
    experts: tuple[str, ...]
    output: str
    overrides: tuple[tuple[re.Pattern[str], str], ...] = ()

    def of(self, name: str) -> str:
        """Where the weight of this name lies."""
        for pattern, device in self.overrides:
            if pattern.search(name):
                return device
        found = _LAYER.match(name)
        if found is None:
            return self.layers[0] if name.startswith("token_embd.") else self.output
        layer = int(found[1])
        return self.experts[layer] if _EXPERTS in name else self.layers[layer]

    @property
    def uses_devices(self) -> bool:
        """Whether anything lies outside host memory."""
        return any(device != CPU for device in (*self.layers, *self.experts, self.output))

    def text(self) -> str:
        """One line for the user."""
        n_layer = len(self.layers)
        parts = []
        for device in dict.fromkeys((*self.layers, self.output)):
            on = [i for i in range(n_layer) if self.layers[i] == device]
            kept = sum(self.experts[i] != device for i in on)
            part = f"{device}: {len(on)} of {n_layer} layers" + (
                " and the output" if self.output == device else ""
            )
            parts.append(part + (f", experts of {kept} in host memory" if kept else ""))
        return "; ".join(parts)


@dataclass(frozen=True)
class _Costs:
    """Bytes of weights."""

    layers: list[int]
    experts: list[int]
    embedding: int
    output: int
    cache_of_layer: int = 0
    total: int = field(init=False)

    def __post_init__(self) -> None:
        weights = sum(self.layers) + sum(self.experts) + self.embedding + self.output
        object.__setattr__(self, "total", weights)


def everything_on(config: ModelConfig, device: str) -> Placement:
    """All on one device."""
    return Placement((device,) * config.n_layer, (device,) * config.n_layer, device)


def place(
    config: ModelConfig,
    sizes: Mapping[str, int],
    rooms: Sequence[Room],
    options: PlacementOptions,
    *,
    cache_bytes: int,
    workspace_bytes: int,
) -> Placement:
    """Decide, without touching anything.

    Args:
        sizes: bytes of the weights by name.
        rooms: GPUs in order; none: all goes to the CPU.
        cache_bytes: of all layers.
        workspace_bytes: intermediates of the largest batch, on each GPU.

    Raises:
        UsageError: an option names a device that is not here, or has no sense.
    """
    overrides = _compile(options.override_tensor, [room.name for room in rooms])
    if not rooms or options.gpu_layers == 0:
        everywhere = everything_on(config, CPU)
        return Placement(everywhere.layers, everywhere.experts, CPU, overrides)
    split = _check_split(options.tensor_split, rooms)
    costs = _costs(config, sizes, cache_bytes)
    budgets = [int(room.free_bytes * _SHARE) - workspace_bytes - _SPARE_BYTES for room in rooms]
    names = [room.name for room in rooms]
    if options.gpu_layers is not None:
        n = min(options.gpu_layers, config.n_layer)
        first = config.n_layer - n
        output = options.gpu_layers > config.n_layer
        layers = _deal(costs, first, names, split or _by_bytes(costs, first, budgets))
    else:
        first = _first_that_fits(costs, budgets)
        output = first < config.n_layer
        layers = _deal(costs, first, names, split or _by_bytes(costs, first, budgets))
    experts = list(layers)
    if options.cpu_moe:
        experts = [CPU] * config.n_layer
    elif options.gpu_layers is None:
        experts = _experts_that_fit(costs, layers, names, budgets)
    last = layers[-1] if output else CPU
    return Placement(tuple(layers), tuple(experts), last, overrides)


def fitting_context(
    config: ModelConfig, weights_bytes: int, rooms: Sequence[Room], bytes_per_position: int
) -> int:
    """Positions for a cache beside the weights on these GPUs.

    Where the weights leave no room, experts will move to host memory, and the cache is of a length
    that is of use.
    """
    room = sum(int(r.free_bytes * _SHARE) - 2 * _SPARE_BYTES for r in rooms) - weights_bytes
    fits = max(room, 0) // bytes_per_position // 64 * 64
    return min(config.n_ctx_train, max(fits, _LEAST_CTX))


def _compile(
    pairs: Sequence[tuple[str, str]], names: Sequence[str]
) -> tuple[tuple[re.Pattern[str], str], ...]:
    compiled = []
    for pattern, device in pairs:
        if device not in (CPU, *names):
            known = ", ".join((CPU, *names))
            raise UsageError(f"override_tensor {pattern}={device}: the devices here are {known}")
        try:
            compiled.append((re.compile(pattern), device))
        except re.error as error:
            raise UsageError(
                f"override_tensor {pattern!r} is no regular expression: {error}"
            ) from None
    return tuple(compiled)


def _check_split(split: Sequence[float] | None, rooms: Sequence[Room]) -> list[float] | None:
    if split is None:
        return None
    if len(split) != len(rooms) or any(part < 0 for part in split) or not sum(split) > 0:
        raise UsageError(
            f"tensor_split {list(split)}: give one part, 0 or more, for each of {len(rooms)} GPUs"
        )
    return [part / sum(split) for part in split]


def _costs(config: ModelConfig, sizes: Mapping[str, int], cache_bytes: int) -> _Costs:
    layers, experts = [0] * config.n_layer, [0] * config.n_layer
    embedding = output = 0
    for name, n_bytes in sizes.items():
        found = _LAYER.match(name)
        if found is not None:
            (experts if _EXPERTS in name else layers)[int(found[1])] += n_bytes
        elif name.startswith("token_embd."):
            embedding += n_bytes
        else:
            output += n_bytes
    if config.tied_embeddings:
        output += embedding
    return _Costs(layers, experts, embedding, output, cache_bytes // config.n_layer)


def _first_that_fits(costs: _Costs, budgets: Sequence[int]) -> int:
    """The first layer of those that fit, without experts, from the last one on."""
    room = sum(max(budget, 0) for budget in budgets) - costs.output
    n_layer = len(costs.layers)
    if room < 0:
        return n_layer
    for layer in reversed(range(n_layer)):
        room -= costs.layers[layer] + costs.cache_of_layer
        if layer == 0:
            room -= costs.embedding
        if room < 0:
            return layer + 1
    return 0


def _by_bytes(costs: _Costs, first: int, budgets: Sequence[int]) -> list[float]:
    """Parts of the layers from ``first`` on: the first GPUs are filled, the others keep free."""
    left = float(sum(_whole(costs, i) for i in range(first, len(costs.layers))) + costs.output)
    needed = max(left, 1.0)
    parts = []
    for budget in budgets:
        part = min(float(max(budget, 0)), left)
        parts.append(part / needed)
        left -= part
    # What fits nowhere (experts that will stay behind) spreads as the rest does.
    total = sum(parts)
    return [part / total for part in parts] if total > 0 else [1.0] + [0.0] * (len(parts) - 1)


def _whole(costs: _Costs, layer: int) -> int:
    return costs.layers[layer] + costs.experts[layer] + costs.cache_of_layer


def _deal(costs: _Costs, first: int, names: Sequence[str], parts: Sequence[float]) -> list[str]:
    """Consecutive layers to one device after the other, in these parts of their bytes."""
    n_layer = len(costs.layers)
    devices = [CPU] * first
    total = sum(_whole(costs, i) for i in range(first, n_layer))
    done, device, bound = 0.0, 0, parts[0]
    for layer in range(first, n_layer):
        middle = (done + _whole(costs, layer) / 2) / max(total, 1)
        while middle > bound + 1e-9 and device + 1 < len(names):
            device += 1
            bound += parts[device]
        devices.append(names[device])
        done += _whole(costs, layer)
    return devices


def _experts_that_fit(
    costs: _Costs, layers: Sequence[str], names: Sequence[str], budgets: Sequence[int]
) -> list[str]:
    """Experts on their layer's device as far as there is room, from the last layer on."""
    room = dict(zip(names, budgets, strict=True))
    for layer, device in enumerate(layers):
        if device != CPU:
            room[device] -= costs.layers[layer] + costs.cache_of_layer
    if layers and layers[0] != CPU:
        room[layers[0]] -= costs.embedding
    if layers and layers[-1] != CPU:
        room[layers[-1]] -= costs.output
    experts = [CPU] * len(layers)
    for layer in reversed(range(len(layers))):
        device = layers[layer]
        if device == CPU or (costs.experts[layer] and room[device] < costs.experts[layer]):
            continue
        room[device] -= costs.experts[layer]
        experts[layer] = device
    return experts
