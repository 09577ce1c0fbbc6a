"""What a model file is and what it would cost to run, without loading its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import _core
from .cache import BLOCK_CELLS, CACHE_TYPES, bytes_per_position, cache_bytes
from .chat import ChatTemplate
from .config import ModelConfig, config_from_gguf
from .errors import MlaError, UsageError
from .gguf import GGUFFile, TensorInfo, read_gguf
from .loading import is_stored_on_network
from .memory import active_weight_bytes, choose_context, oversize_note
from .planning import automatic_batch, planned_bytes
from .pretokenizers import PRE_TOKENIZERS
from .tokenizer import Tokenizer
from .weights import check as check_weights


@dataclass(frozen=True)
class FormatCount:
    """The tensors of one format."""

    format: str
    n_tensors: int
    n_elems: int
    n_bytes: int


@dataclass(frozen=True)
class Shard:
    """One file of the model."""

    path: str
    n_bytes: int


@dataclass(frozen=True)
class CacheCost:
    """What a context costs in one cache type: per position, and for ``MemoryPlan.n_ctx``."""

    cache_type: str
    bytes_per_position: int
    n_bytes: int
    n_bytes_trained: int


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer as the file describes it.

    Attributes:
        is_known: whether text can be encoded here; token ids work in any case.
        template: "file" or "built-in".
    """

    model: str
    pre: str
    is_known: bool
    n_vocab: int
    bos: str
    eos: tuple[str, ...]
    add_bos: bool
    template: str


@dataclass(frozen=True)
class MemoryPlan:
    """Whether the model fits.

    Attributes:
        n_ctx: positions, as asked or as chosen.
        n_ctx_fits: the most positions that fit beside workspace and copies.
        weights_mapped_bytes: pages of the files, which the system may drop and read again.
        weights_copied_bytes, cache_bytes, workspace_bytes: anonymous memory.
        available_bytes: anonymous memory that this machine or its cgroup can still give.
        note: how the context was chosen, or None where it was asked for.
        warning: what it means that the mapped weights exceed memory, or None.
    """

    n_ctx: int
    n_ctx_fits: int
    cache_type: str
    weights_mapped_bytes: int
    weights_copied_bytes: int
    cache_bytes: int
    workspace_bytes: int
    available_bytes: int
    note: str | None
    warning: str | None

    @property
    def anonymous_bytes(self) -> int:
        """Cache, workspace and copies together: they have to fit."""
        return self.weights_copied_bytes + self.cache_bytes + self.workspace_bytes

    @property
    def fits(self) -> bool:
        """Whether the model can be loaded."""
        return self.anonymous_bytes <= self.available_bytes

    @property
    def weights_stay(self) -> bool:
        """Whether the mapped weights can stay in memory beside the rest."""
        return self.anonymous_bytes + self.weights_mapped_bytes <= self.available_bytes


@dataclass(frozen=True)
class ModelReport:
    """Everything that ``inspect_model`` finds.

    Attributes:
        n_params: numbers in the weights; ``n_params_active`` of them take part in one token.
        formats: tensors by format, most bytes first.
        caches: one entry per cache type that fits the latent.
    """

    name: str | None
    architecture: str
    config: ModelConfig
    n_params: int
    n_params_active: int
    formats: tuple[FormatCount, ...]
    shards: tuple[Shard, ...]
    tokenizer: TokenizerFacts | None
    caches: tuple[CacheCost, ...]
    memory: MemoryPlan


def inspect_model(
    path: str | Path,
    *,
    n_ctx: int | None = None,
    cache_type: str = "f16",
    precision: str = "fast",
    n_batch: int | None = None,
    mmap: bool = True,
) -> ModelReport:
    """Read a model file's header and plan its memory; arguments are those of ``Model.load``.

    Raises:
        ModelError: the file is damaged, incomplete, or no model this engine runs.
        UsageError: an argument has no such value.
    """
    file = read_gguf(path)
    config = config_from_gguf(file)
    infos = check_weights(config, file)
    n_elems = {name: math.prod(info.shape) for name, info in infos.items()}
    memory = _plan(file, config, infos, n_ctx, cache_type, precision, n_batch, mmap)
    name = file.metadata.get("general.name")
    return ModelReport(
        name=name if isinstance(name, str) else None,
        architecture=str(file.metadata["general.architecture"]),
        config=config,
        n_params=sum(n_elems.values()),
        n_params_active=active_weight_bytes(config, n_elems),
        formats=_count_formats(file.tensors.values()),
        shards=tuple(
            Shard(str(path), n) for path, n in zip(file.paths, file.shard_bytes, strict=True)
        ),
        tokenizer=_tokenizer_facts(file.metadata),
        caches=tuple(_cache_costs(config, memory.n_ctx)),
        memory=memory,
    )


def _plan(
    file: GGUFFile,
    config: ModelConfig,
    infos: dict[str, TensorInfo],
    n_ctx: int | None,
    cache_type: str,
    precision: str,
    n_batch: int | None,
    mmap: bool,
) -> MemoryPlan:
    per_position = bytes_per_position(config, cache_type)
    choice = choose_context(config, n_ctx, cache_type, file.n_bytes, cache_in_file=False)
    cached = cache_bytes(config, cache_type, choice.n_ctx)
    mapped = mmap and not any(is_stored_on_network(path) for path in file.paths)
    workspace, widened = planned_bytes(
        file,
        config,
        infos,
        _core.CpuBackend(_core.ThreadPool(0), ""),
        n_ctx=choice.n_ctx,
        cache_type=cache_type,
        precision=precision,
        n_batch=n_batch or automatic_batch(config, choice.n_ctx, file.n_bytes + cached),
    )
    copied = widened + (0 if mapped else file.n_bytes)
    available = _core.available_memory_bytes()
    room = max(available - copied - workspace, 0)
    sizes = {name: info.n_bytes for name, info in infos.items()}
    active = active_weight_bytes(config, sizes)
    return MemoryPlan(
        n_ctx=choice.n_ctx,
        n_ctx_fits=room // per_position // BLOCK_CELLS * BLOCK_CELLS,
        cache_type=cache_type,
        weights_mapped_bytes=file.n_bytes if mapped else 0,
        weights_copied_bytes=copied,
        cache_bytes=cached,
        workspace_bytes=workspace,
        available_bytes=available,
        note=choice.note,
        warning=oversize_note(file.n_bytes, active) if mapped else None,
    )


def _count_formats(infos: Iterable[TensorInfo]) -> tuple[FormatCount, ...]:
    counts: dict[str, FormatCount] = {}
    for info in infos:
        seen = counts.get(info.format, FormatCount(info.format, 0, 0, 0))
        counts[info.format] = FormatCount(
            info.format,
            seen.n_tensors + 1,
            seen.n_elems + math.prod(info.shape),
            seen.n_bytes + info.n_bytes,
        )
    return tuple(sorted(counts.values(), key=lambda count: -count.n_bytes))


def _cache_costs(config: ModelConfig, n_ctx: int) -> Iterable[CacheCost]:
    for cache_type in CACHE_TYPES:
        try:
            yield CacheCost(
                cache_type,
                bytes_per_position(config, cache_type),
                cache_bytes(config, cache_type, n_ctx),
                cache_bytes(config, cache_type, config.n_ctx_train),
            )
        except UsageError:  # the latent is no multiple of this type's blocks
            continue


def _tokenizer_facts(metadata: Mapping[str, object]) -> TokenizerFacts | None:
    """None where the file has no tokenizer that could be read."""
    try:
        tokenizer = Tokenizer.from_metadata(metadata)
        template = ChatTemplate.from_metadata(
            metadata, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )
    except MlaError:  # also a template that is no text
        return None
    return TokenizerFacts(
        model=tokenizer.model,
        pre=tokenizer.pre,
        is_known=tokenizer.model == "gpt2" and tokenizer.pre in PRE_TOKENIZERS,
        n_vocab=tokenizer.vocab_size,
        bos=tokenizer.bos_token,
        eos=tuple(tokenizer.vocabulary.text(i) for i in sorted(tokenizer.eos_ids)),
        add_bos=tokenizer.add_bos,
        template="built-in" if template.is_builtin else "file",
    )
