"""What loading a model will take, decided before its weights are touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from mla_backend import _core
from mla_backend.cache import BLOCK_CELLS, LatentCache, bytes_per_position, cache_bytes
from mla_backend.config import ModelConfig
from mla_backend.errors import MemoryLimitError
from mla_backend.gguf import GGUFFile, TensorInfo
from mla_backend.loading import LoadOptions, Weights, is_stored_on_network
from mla_backend.memory import (
    ContextChoice,
    active_weight_bytes,
    check_memory,
    choose_context,
    oversize_note,
    report_memory,
)
from mla_backend.numa import NumaPlan
from mla_backend.placement import CPU, PlacementOptions, Room, fitting_context, place
from mla_backend.runner import Engine, Runner
from mla_backend.settling import Demand, give_up, settle
from mla_backend.threads import Defaults

#: How to get a file into the split layout.
LEGACY_NOTE: Final = (
    "the file has the legacy tensor layout (attn_kv_b); it runs as it is. "
    "`mla-backend upgrade OLD.gguf NEW.gguf` rewrites it once into the split layout"
)
#: Tokens of a prompt computed at a time: each pass reads and unpacks every expert once, so the
#: longer the better. A CPU takes the first whose intermediates find room.
_CPU_BATCHES: Final = (4096, 2048, 1024, 512)
_DEVICE_BATCH: Final = 4096
#: Part of the memory left by weights and cache that intermediates may take.
_WORKSPACE_SHARE: Final = 0.25
_UNLOCKED_NOTE: Final = "mlock has no effect: the weights are read into memory, not mapped"


class LoadPlan:
    """What loading is going to take, decided before it begins.

    Attributes:
        n_ctx: positions, as asked or as chosen.
        options: how weights reach memory; ``mmap`` is False on network file systems.
        numa: which nodes keep what; with a mode other than "off" weights are read onto them.
        weights_fit: whether all weights find room in memory at once.
        n_batch: tokens of a prompt computed at a time.
        placement: what goes to which device.
        defaults: what was chosen for the user.
        notes: one-line statements for the user.

    Raises MemoryLimitError where cache and copied weights alone are too much and must be (else the
    weights stay mapped), UsageError as ``place`` does.
    """

    def __init__(
        self,
        file: GGUFFile,
        config: ModelConfig,
        infos: dict[str, TensorInfo],
        cache_type: str,
        n_ctx: int | None,
        kv_file: str | Path | None,
        options: LoadOptions,
        *,
        gpus: Sequence[_core.Backend],
        wishes: PlacementOptions,
        n_batch: int | None,
        numa: NumaPlan,
        must_place: bool,
        choose_defaults: Callable[[NumaPlan], Defaults],
    ) -> None:
        """``must_place``: weights on nodes or nowhere. ``choose_defaults``: by the final plan."""
        self.file = file
        self.config = config
        self.infos = infos
        self.cache_type = cache_type
        self.kv_file = Path(kv_file) if kv_file is not None else None
        sizes = {name: info.n_bytes for name, info in infos.items()}
        rooms = [Room(gpu.name, gpu.free_bytes()) for gpu in gpus]
        self.defaults = choose_defaults(numa)
        self._choose_defaults = choose_defaults
        if rooms and wishes.gpu_layers != 0:
            choice = _context_on_devices(config, n_ctx, cache_type, sum(sizes.values()), rooms)
        else:
            choice = choose_context(
                config, n_ctx, cache_type, file.n_bytes, cache_in_file=kv_file is not None
            )
        self.n_ctx = choice.n_ctx
        held = 0 if kv_file is not None else cache_bytes(config, cache_type, self.n_ctx)
        on_host = automatic_batch(config, self.n_ctx, file.n_bytes + held, self.defaults.n_batch)
        self.n_batch = min(n_batch or (_DEVICE_BATCH if rooms else on_host), self.n_ctx)
        self.placement = place(
            config,
            sizes,
            rooms,
            wishes,
            cache_bytes=cache_bytes(config, cache_type, self.n_ctx),
            workspace_bytes=_workspace_estimate(config, self.n_batch),
        )
        on_cpu = sum(device == CPU for device in self.placement.layers)
        #: Part of the cache that lies in host memory.
        self.host_share = on_cpu / config.n_layer
        if n_batch is None and not self.placement.uses_devices:
            self.n_batch = on_host
        mapped = options.mmap and not any(is_stored_on_network(path) for path in file.paths)
        self.options = replace(options, mmap=mapped)
        self._must_place = must_place
        self._set_nodes(settle(numa, self._demand(), required=must_place))
        self._oversize = oversize_note(file.n_bytes, active_weight_bytes(config, sizes))
        self.weights_fit = self._oversize is None
        self.notes = self._find_notes(choice)
        self._fit(lambda: self._check_memory(workspace_bytes=0, widened_bytes=0))

    def _set_nodes(self, numa: NumaPlan) -> None:
        if self.defaults.by_nodes != numa.confines_threads:
            self.defaults = self._choose_defaults(numa)
        self.numa = numa

    def _demand(self) -> Demand:
        """What is to find room on the nodes, as far as it is known before graphs are planned."""
        read = self._on_cpu_bytes + (0 if self.options.mmap else self._elsewhere_bytes)
        cache = 0
        if self.kv_file is None:
            cache = round(cache_bytes(self.config, self.cache_type, self.n_ctx) * self.host_share)
        return Demand(read, cache, _workspace_estimate(self.config, self.n_batch))

    def _fit(self, check: Callable[[], None]) -> None:
        """Leave the weights mapped where they are too much as copies, if that may be."""
        try:
            check()
        except MemoryLimitError as error:
            if self._must_place or not self.placed_bytes:
                raise
            self._set_nodes(give_up(self.numa, str(error)))
            self.notes.append(self.numa.notes[-1])
            if self._oversize is not None and self.options.mmap:
                self.notes.append(self._oversize)
            check()

    def make_backend(self, isa: str | None, precision: str) -> _core.CpuBackend:
        """The CPU with threads next to the weights, or where the process may run.

        Where loading takes long, what it would end in is found out before: raises MemoryLimitError.
        """
        if self.placed_bytes or not self.options.mmap:
            self._fit(lambda: self._check_workspace(isa, precision))
        return _core.CpuBackend(_make_pool(self.defaults.threads, self.numa), isa or "")

    def _find_notes(self, choice: ContextChoice) -> list[str]:
        mapped = self.options.mmap and not self.placed_bytes
        notes = (
            choice.note,
            self._oversize if mapped else None,
            LEGACY_NOTE if self.config.layout == "legacy" else None,
            _UNLOCKED_NOTE if self.options.mlock and not mapped else None,
            self.placement.text() if self.placement.uses_devices else None,
            *self.numa.notes,
            self.defaults.problem or None,
        )
        return [note for note in notes if note is not None]

    @property
    def placed_bytes(self) -> int:
        """Bytes of weights that are read onto NUMA nodes: those that the CPU computes with."""
        if self.numa.mode == "off":
            return 0
        return self._on_cpu_bytes

    @property
    def _on_cpu_bytes(self) -> int:
        on_cpu = (name for name in self.infos if self.placement.of(name) == CPU)
        return sum(self.infos[name].n_bytes for name in on_cpu)

    @property
    def _elsewhere_bytes(self) -> int:
        return sum(info.n_bytes for info in self.infos.values()) - self._on_cpu_bytes

    def _check_workspace(self, isa: str | None, precision: str) -> None:
        """Refuse what does not fit, the workspace included. Raises MemoryLimitError."""
        backend = _core.CpuBackend(_make_pool(self.defaults.threads, self.numa), isa or "")
        workspace, widened = planned_bytes(
            self.file,
            self.config,
            self.infos,
            backend,
            n_ctx=self.n_ctx,
            cache_type=self.cache_type,
            precision=precision,
            n_batch=self.n_batch,
        )
        self._check_memory(workspace_bytes=workspace, widened_bytes=widened)

    def _check_memory(self, *, workspace_bytes: int, widened_bytes: int) -> None:
        # Without nodes, and where it is mapped, it comes as whole files.
        rest = self.file.n_bytes
        if self.placed_bytes and not (self.options.mmap and self._elsewhere_bytes):
            rest = self._elsewhere_bytes
        mapped = self.options.mmap
        report = report_memory(
            self.config,
            self.cache_type,
            self.n_ctx,
            mapped_bytes=rest if mapped else 0,
            copied_bytes=widened_bytes + self.placed_bytes + (0 if mapped else rest),
            workspace_bytes=workspace_bytes,
            host_share=self.host_share,
        )
        check_memory(report, cache_in_file=self.kv_file is not None)


def _make_pool(threads: int | None, nodes: NumaPlan) -> _core.ThreadPool:
    if not nodes.confines_threads:
        return _core.ThreadPool(threads or 0)
    n_cores = min(sum(group.n_cores for group in nodes.groups), _core.usable_physical_cores())
    return _core.ThreadPool(threads or n_cores, nodes=nodes.shares)


def _context_on_devices(
    config: ModelConfig,
    n_ctx: int | None,
    cache_type: str,
    weights_bytes: int,
    rooms: Sequence[Room],
) -> ContextChoice:
    """As asked, or what GPUs hold beside the weights."""
    if n_ctx is not None:
        return choose_context(config, n_ctx, cache_type, 0, cache_in_file=False)
    fits = fitting_context(config, weights_bytes, rooms, bytes_per_position(config, cache_type))
    trained = fits == config.n_ctx_train
    return ContextChoice(
        fits,
        f"context: {fits} positions, the trained length"
        if trained
        else f"context: {fits} positions of the {config.n_ctx_train} trained, to leave the GPUs "
        "room; set n_ctx to change it",
    )


def automatic_batch(
    config: ModelConfig, n_ctx: int, held_bytes: int, most: int | None = None
) -> int:
    """Tokens of a pass on a CPU, beside weights and cache of ``held_bytes``; ``most`` at most."""
    available = _core.available_memory_bytes()
    room = max(available - held_bytes, available // 8) * _WORKSPACE_SHARE
    fitting = (n for n in _CPU_BATCHES if _workspace_estimate(config, n) <= room)
    return min(next(fitting, _CPU_BATCHES[-1]), n_ctx, most or n_ctx)


def _workspace_estimate(config: ModelConfig, n_batch: int) -> int:
    """Bytes of intermediates of a batch: the widest values that live at one time."""
    width = 4 * config.d_model + 2 * config.n_head * (config.d_key + config.d_value)
    if config.moe is not None:
        width += config.moe.n_expert_used * (2 * config.moe.d_ff + config.d_model)
    return n_batch * 4 * max(width, 3 * config.d_ff)


def planned_bytes(
    file: GGUFFile,
    config: ModelConfig,
    infos: Mapping[str, TensorInfo],
    backend: _core.CpuBackend,
    *,
    n_ctx: int,
    cache_type: str,
    precision: str,
    n_batch: int,
) -> tuple[int, int]:
    """Bytes of intermediates, and of weights kept in another form: (workspace, copies).

    The graphs are planned as at load, over mapped weights of which hardly a page is read, and a
    cache that is never written, so that it takes no memory.
    """
    mapped = [_core.MappedFile(str(path)) for path in file.paths]
    weights = Weights.of_sources(file, infos, mapped, mapped=True)
    engine = Engine(config, weights, _core.Workspace([backend]), precision, "auto", backend.isa)
    n_batch = min(n_batch, n_ctx)
    if cache_bytes(config, cache_type, n_ctx) > _core.available_memory_bytes():
        n_ctx = BLOCK_CELLS  # all but some kilobytes show with a small one as well
    cache = LatentCache(config, n_ctx, cache_type, backend=backend)
    runner = Runner(engine, cache)
    for n_tokens in (n_batch, 1):
        runner.prepare(n_tokens)
    return engine.workspace.n_bytes, weights.copied_bytes
