"""What goes where: each layer, its experts, the embedding and the output to one device.

A layer's cache lies where its attention is computed. Where memory is short, experts leave the GPU
first: they are most of the bytes, and few of them are read for a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from mla_backend.config import ModelConfig
from mla_backend.errors import UsageError

CPU: Final = "cpu"
_LAYER = re.compile(r"blk\.(\d+)\.")
_EXPERTS = "_exps."
#: Read by steps that run with their layer (``LayerContext``), wherever the weights lie.
_READ_BY_LAYER = re.compile(r"\.(attn_[kv]_b|attn_kv_b|ffn_gate_inp)\.")
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
        device = _override(name, self.overrides)
        if device is not None:
            return device
        found = _LAYER.match(name)
        if found is None:
            return self.layers[0] if name.startswith("token_embd.") else self.output
        layer = int(found[1])
        return self.experts[layer] if _EXPERTS in name else self.layers[layer]

    def is_read_on_cpu_alone(self, name: str) -> bool:
        """Whether the weight lies in host memory, and all that reads it runs on the CPU.

        As the graphs place their steps: a gate and what goes up are one product, run where the gate
        lies; the embedding may be the output's matrix as well.
        """
        readers = {self.of(name), self.of(name.replace(".ffn_up", ".ffn_gate"))}
        found = _LAYER.match(name)
        if found is not None and _READ_BY_LAYER.search(name):
            readers.add(self.of(found[0]))
        if name.startswith("token_embd."):
            readers.add(self.of("output.weight"))
        return readers == {CPU}

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
    """Bytes, by what lies together: of each layer with its cache, and of its experts."""

    layers: list[int]
    experts: list[int]
    embedding: int
    output: int

    def of_layer(self, layer: int, *, with_experts: bool) -> int:
        """The embedding is the first layer's, the output the last's."""
        n_bytes = self.layers[layer] + (self.experts[layer] if with_experts else 0)
        n_bytes += self.embedding if layer == 0 else 0
        return n_bytes + (self.output if layer == len(self.layers) - 1 else 0)


@dataclass(frozen=True)
class _Gpus:
    names: list[str]
    budgets: list[int]


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
    names = [room.name for room in rooms]
    overrides = _compile(options.override_tensor, names)
    if options.gpu_layers is not None and options.gpu_layers < 0:
        raise UsageError(f"gpu_layers is {options.gpu_layers}, accepted is 0 or more")
    if not rooms or options.gpu_layers == 0:
        return replace(everything_on(config, CPU), overrides=overrides)
    split = _check_split(options.tensor_split, rooms)
    budgets = [int(room.free_bytes * _SHARE) - workspace_bytes - _SPARE_BYTES for room in rooms]
    placed = _placed_by_name(sizes, overrides)
    gpus = _Gpus(names, [n - placed.get(name, 0) for name, n in zip(names, budgets, strict=True)])
    costs = _costs(config, sizes, overrides, cache_bytes, cpu_moe=options.cpu_moe)
    if options.gpu_layers is None:
        layers = _layers_that_fit(costs, gpus, split)
        output = layers[-1]
        experts = _experts_that_fit(costs, layers, gpus)
    else:
        first = max(config.n_layer - options.gpu_layers, 0)
        layers = _deal(costs, first, gpus, split)
        output = layers[-1] if options.gpu_layers > config.n_layer else CPU
        experts = layers
    if options.cpu_moe:
        experts = [CPU if i >= config.n_layer_dense else d for i, d in enumerate(layers)]
    return Placement(tuple(layers), tuple(experts), output, overrides)


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


def _placed_by_name(
    sizes: Mapping[str, int], overrides: Sequence[tuple[re.Pattern[str], str]]
) -> dict[str, int]:
    """Bytes by device of the weights that ``override_tensor`` places."""
    placed: dict[str, int] = {}
    for name, n_bytes in sizes.items():
        device = _override(name, overrides)
        if device is not None:
            placed[device] = placed.get(device, 0) + n_bytes
    return placed


def _override(name: str, overrides: Sequence[tuple[re.Pattern[str], str]]) -> str | None:
    return next((device for pattern, device in overrides if pattern.search(name)), None)


def _costs(
    config: ModelConfig,
    sizes: Mapping[str, int],
    overrides: Sequence[tuple[re.Pattern[str], str]],
    cache_bytes: int,
    *,
    cpu_moe: bool,
) -> _Costs:
    """Without the weights whose place is decided already."""
    layers, experts = [0] * config.n_layer, [0] * config.n_layer
    embedding = output = 0
    for name, n_bytes in sizes.items():
        found = _LAYER.match(name)
        if _override(name, overrides) is not None or (cpu_moe and _EXPERTS in name):
            continue
        if found is not None:
            (experts if _EXPERTS in name else layers)[int(found[1])] += n_bytes
        elif name.startswith("token_embd."):
            embedding += n_bytes
        else:
            output += n_bytes
    if config.tied_embeddings:
        output += embedding
    cache_of_layer = -(-cache_bytes // config.n_layer)
    return _Costs([n + cache_of_layer for n in layers], experts, embedding, output)


def _layers_that_fit(costs: _Costs, gpus: _Gpus, split: Sequence[float] | None) -> list[str]:
    """The last layers and the output on GPUs: as many as fit, without experts where need be."""
    n_layer = len(costs.layers)
    if split is None:
        whole = _fill(costs, 0, gpus, with_experts=True)
        if whole is not None:
            return whole
    for first in range(n_layer):
        # In parts of what each GPU has room for, so that experts find room on all of them; or
        # tightly, where whole layers do not come out in these parts.
        layers = _deal(costs, first, gpus, split)
        rooms = _rooms(costs, layers, gpus)
        if all(rooms[device] >= 0 for device in set(layers) - {CPU}):
            return layers
        tight = _fill(costs, first, gpus, with_experts=False) if split is None else None
        if tight is not None:
            return tight
    return [CPU] * n_layer


def _fill(costs: _Costs, first: int, gpus: _Gpus, *, with_experts: bool) -> list[str] | None:
    """Layers from ``first`` on to one GPU after the other, each until it is full."""
    rooms = list(gpus.budgets)
    layers, device = [CPU] * first, 0
    for layer in range(first, len(costs.layers)):
        needed = costs.of_layer(layer, with_experts=with_experts)
        while device < len(rooms) and rooms[device] < needed:
            device += 1
        if device == len(rooms):
            return None
        rooms[device] -= needed
        layers.append(gpus.names[device])
    return layers


def _deal(costs: _Costs, first: int, gpus: _Gpus, split: Sequence[float] | None) -> list[str]:
    """Layers from ``first`` on to one GPU after the other, in these parts of their bytes.

    Without parts, the first GPUs are filled, and the others keep free.
    """
    sizes = [costs.of_layer(i, with_experts=True) for i in range(len(costs.layers))]
    total = max(sum(sizes[first:]), 1)
    parts = split or _parts(total, gpus.budgets)
    layers = [CPU] * first
    done, device, bound = 0, 0, parts[0]
    last = max(i for i, part in enumerate(parts) if part > 0)
    for size in sizes[first:]:
        while (done + size / 2) / total > bound and device < last:
            device += 1
            bound += parts[device]
        layers.append(gpus.names[device])
        done += size
    return layers


def _parts(total: int, budgets: Sequence[int]) -> list[float]:
    left, parts = total, []
    for budget in budgets:
        part = min(max(budget, 0), left)
        parts.append(part)
        left -= part
    # What fits nowhere (experts that will stay behind) spreads as the rest does.
    placed = total - left
    return [part / placed for part in parts] if placed else [1.0] + [0.0] * (len(parts) - 1)


def _rooms(costs: _Costs, layers: Sequence[str], gpus: _Gpus) -> dict[str, int]:
    """Bytes left on each GPU by these layers without their experts."""
    rooms = dict(zip(gpus.names, gpus.budgets, strict=True))
    for layer, device in enumerate(layers):
        if device != CPU:
            rooms[device] -= costs.of_layer(layer, with_experts=False)
    return rooms


def _experts_that_fit(costs: _Costs, layers: Sequence[str], gpus: _Gpus) -> list[str]:
    """Experts on their layer's device as far as there is room, from the last layer on."""
    rooms = _rooms(costs, layers, gpus)
    experts = list(layers)
    for layer in reversed(range(len(layers))):
        device, needed = layers[layer], costs.experts[layer]
        if device == CPU or needed == 0:
            continue
        if needed <= rooms[device]:
            rooms[device] -= needed
        else:
            experts[layer] = CPU
    return experts
