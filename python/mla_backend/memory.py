"""What a model needs in memory, and what context fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mla_backend import _core
from mla_backend.cache import BLOCK_CELLS, bytes_per_position, cache_bytes
from mla_backend.config import ModelConfig
from mla_backend.errors import MemoryLimitError

#: A context smaller than this is not chosen on its own, however tight memory is.
_MIN_CTX: Final = 2048
#: Part of what is free that an automatic context may take; the rest is for prompts and others.
_SHARE: Final = 0.8
GIB: Final = 1 << 30


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by purpose. Mapped weights are the file's pages; the rest is anonymous memory.

    ``device_bytes``: weights, cache and workspace in the memory of devices; all else is the host's.
    """

    weights_mapped_bytes: int
    weights_copied_bytes: int
    cache_bytes: int
    cache_bytes_per_position: int
    workspace_bytes: int
    device_bytes: int = 0

    @property
    def anonymous_bytes(self) -> int:
        """What cannot be dropped and read again: cache, workspace and copies."""
        return self.weights_copied_bytes + self.cache_bytes + self.workspace_bytes


@dataclass(frozen=True)
class ContextChoice:
    """A context length and, where it was not asked for, the sentence that explains it."""

    n_ctx: int
    note: str | None


def choose_context(
    config: ModelConfig,
    n_ctx: int | None,
    cache_type: str,
    weights_bytes: int,
    *,
    cache_in_file: bool,
) -> ContextChoice:
    """``n_ctx`` as asked, or the trained length, or what memory allows.

    ``weights_bytes`` counts the weights, mapped or not: an automatic context leaves them room.
    """
    if n_ctx is not None:
        beyond = n_ctx > config.n_ctx_train
        trained = f"context: {n_ctx} positions, more than the {config.n_ctx_train} trained"
        return ContextChoice(n_ctx, trained if beyond else None)
    available = _core.available_memory_bytes()
    room = max(available - weights_bytes, available // 8) * _SHARE
    fits = int(room) // bytes_per_position(config, cache_type) // BLOCK_CELLS * BLOCK_CELLS
    chosen = min(config.n_ctx_train, max(fits, _MIN_CTX))
    if cache_in_file or chosen == config.n_ctx_train:
        chosen = config.n_ctx_train
        return ContextChoice(chosen, f"context: {chosen} positions, the trained length")
    return ContextChoice(
        chosen,
        f"context: {chosen} positions of the {config.n_ctx_train} trained, "
        f"to fit the {available / GIB:.1f} GiB of memory available; set n_ctx to change it",
    )


def check_memory(report: MemoryReport, *, cache_in_file: bool) -> None:
    """Raise MemoryLimitError, with the sum, where anonymous memory exceeds what is available."""
    needed = report.anonymous_bytes - (report.cache_bytes if cache_in_file else 0)
    available = _core.available_memory_bytes()
    if needed <= available:
        return
    cache = 0 if cache_in_file else report.cache_bytes
    raise MemoryLimitError(
        f"{needed / GIB:.2f} GiB of memory needed (cache {cache / GIB:.2f} + workspace "
        f"{report.workspace_bytes / GIB:.2f} + copied weights "
        f"{report.weights_copied_bytes / GIB:.2f}), {available / GIB:.2f} GiB available; "
        "a smaller n_ctx, cache type q8_0 or a kv_file needs less"
    )


def oversize_note(weights_bytes: int, bytes_per_token: int) -> str | None:
    """A warning where mapped weights exceed memory, with the rate a disk then allows."""
    available = _core.available_memory_bytes()
    if weights_bytes <= available:
        return None
    missing = 1 - available / weights_bytes
    disk = 2.0e9  # bytes/s of a common NVMe drive, said with the estimate
    rate = disk / max(bytes_per_token * missing, 1)
    return (
        f"weights of {weights_bytes / GIB:.1f} GiB exceed the {available / GIB:.1f} GiB of memory "
        f"available: parts are read from disk for every token; expect about {rate:.2g} tokens/s "
        "from a drive that reads 2 GB/s"
    )


def active_weight_bytes(config: ModelConfig, tensors: dict[str, int]) -> int:
    """Weight bytes read for one token: everything but unchosen experts and the embedding.

    ``tensors`` holds bytes by name.
    """
    total = 0.0
    for name, n_bytes in tensors.items():
        if name == "token_embd.weight" and not config.tied_embeddings:
            continue
        share = 1.0
        if config.moe is not None and "_exps." in name:
            share = config.moe.n_expert_used / config.moe.n_expert
        total += n_bytes * share
    return int(total)


def report_memory(
    config: ModelConfig,
    cache_type: str,
    n_ctx: int,
    *,
    mapped_bytes: int,
    copied_bytes: int,
    workspace_bytes: int,
    host_share: float = 1.0,
    device_bytes: int = 0,
) -> MemoryReport:
    """The report of a model with one cache of ``n_ctx`` positions, a share of it on the host."""
    return MemoryReport(
        mapped_bytes,
        copied_bytes,
        round(cache_bytes(config, cache_type, n_ctx) * host_share),
        bytes_per_position(config, cache_type),
        workspace_bytes,
        device_bytes,
    )
