"""``inspect``: what a model file is, and what running it would cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from .console import write_json, write_stdout
from .options import ContextOptions, DebugOptions, JsonOptions, ModelPath
from .units import bytes_text, count_text

if TYPE_CHECKING:
    from ..inspection import MemoryPlan, ModelReport, TokenizerFacts

Line = tuple[str, str]


def inspect(
    path: ModelPath, context: ContextOptions, output: JsonOptions, debug: DebugOptions
) -> None:
    """Show what a model file holds, and whether it fits in memory, without loading it."""
    from ..inspection import inspect_model

    report = inspect_model(
        path.path,
        n_ctx=context.n_ctx,
        cache_type=context.cache_type.value,
        precision=context.precision.value,
        n_batch=context.batch_size,
        mmap=not context.no_mmap,
    )
    if output.as_json:
        write_json(_as_json(report))
    else:
        write_stdout(_as_text(report))


def _as_json(report: ModelReport) -> dict[str, object]:
    memory = report.memory
    return asdict(report) | {
        "memory": asdict(memory)
        | {
            "anonymous_bytes": memory.anonymous_bytes,
            "fits": memory.fits,
            "weights_stay": memory.weights_stay,
        }
    }


def _as_text(report: ModelReport) -> str:
    lines = [
        ("model", f"{report.name or '(no name)'}, architecture {report.architecture}"),
        (
            "parameters",
            f"{count_text(report.n_params)}, {count_text(report.n_params_active)} per token",
        ),
        *_config_lines(report),
        *_tokenizer_lines(report.tokenizer),
        *_tensor_lines(report),
        *_cache_lines(report),
        *_memory_lines(report.memory),
    ]
    return "".join(f"{name + ':' if name else '':12} {text}\n" for name, text in lines)


def _config_lines(report: ModelReport) -> Iterator[Line]:
    config = report.config
    if config.layout == "split":
        yield "layout", "split (new): attn_k_b and attn_v_b"
    else:
        from ..planning import LEGACY_NOTE

        yield "layout", f"legacy (old): {LEGACY_NOTE}"
    nextn = config.n_layer_nextn
    unused = f", and {nextn} for prediction, not computed" if nextn else ""
    yield (
        "layers",
        f"{config.n_layer} ({config.n_layer_dense} dense, "
        f"{config.n_layer - config.n_layer_dense} with experts{unused}), width {config.d_model}",
    )
    query = f", query latent {config.q_lora_rank}" if config.q_lora_rank else ""
    yield (
        "attention",
        f"{config.n_head} heads of {config.d_nope}+{config.d_rope} (keys) and {config.d_value} "
        f"(values), latent {config.kv_lora_rank}{query}",
    )
    if (moe := config.moe) is not None:
        groups = f", {moe.n_group_used} of {moe.n_group} groups" if moe.n_group > 1 else ""
        yield (
            "experts",
            f"{moe.n_expert_used} of {moe.n_expert} per token and {moe.n_expert_shared} shared, "
            f"width {moe.d_ff}, {moe.gating} scores{groups}",
        )
    rope = config.rope
    scaled = f", {rope.scaling} x {rope.factor:g} from {rope.original_context}"
    yield (
        "context",
        f"{config.n_ctx_train} positions trained{scaled if rope.factor != 1 else ''}",
    )


def _tokenizer_lines(facts: TokenizerFacts | None) -> Iterator[Line]:
    if facts is None:
        yield "tokenizer", "none that can be read: only token ids work"
        return
    known = "" if facts.is_known else " (not known here: only token ids work)"
    yield "tokenizer", f"{facts.model} / {facts.pre}{known}, {facts.n_vocab} ids"
    bos = "added" if facts.add_bos else "not added"
    yield "", f"BOS {facts.bos!r} ({bos}), EOS {', '.join(map(repr, facts.eos)) or 'none'}"
    source = "from the file" if facts.template == "file" else "built-in, the file has none"
    yield "", f"chat template {source}"


def _tensor_lines(report: ModelReport) -> Iterator[Line]:
    total = sum(shard.n_bytes for shard in report.shards)
    for index, shard in enumerate(report.shards):
        yield "" if index else "files", f"{bytes_text(shard.n_bytes):>10}  {shard.path}"
    if len(report.shards) > 1:
        yield "", f"{bytes_text(total):>10}  together"
    for index, row in enumerate(report.formats):
        yield (
            "" if index else "tensors",
            f"{row.format:8} {row.n_tensors:5}  {bytes_text(row.n_bytes):>10}",
        )


def _cache_lines(report: ModelReport) -> Iterator[Line]:
    n_ctx, trained = report.memory.n_ctx, report.config.n_ctx_train
    for index, cost in enumerate(report.caches):
        text = f"{cost.cache_type:5} {cost.bytes_per_position:8} bytes per position"
        text += f", {bytes_text(cost.n_bytes):>9} for {n_ctx}"
        if trained != n_ctx:
            text += f", {bytes_text(cost.n_bytes_trained):>9} for {trained}"
        yield "" if index else "cache", text


def _memory_lines(memory: MemoryPlan) -> Iterator[Line]:
    yield (
        "memory",
        f"cache {bytes_text(memory.cache_bytes)} ({memory.cache_type}, {memory.n_ctx} positions) "
        f"+ workspace {bytes_text(memory.workspace_bytes)} "
        f"+ copies {bytes_text(memory.weights_copied_bytes)} "
        f"= {bytes_text(memory.anonymous_bytes)}",
    )
    verdict = "it fits" if memory.fits else "it does not fit"
    yield (
        "",
        f"of {bytes_text(memory.available_bytes)} available: {verdict} "
        f"(context of at most {memory.n_ctx_fits} positions)",
    )
    if memory.weights_mapped_bytes:
        stay = "stay in memory" if memory.weights_stay else "exceed what is left of it"
        yield "", f"weights {bytes_text(memory.weights_mapped_bytes)}, mapped: they {stay}"
    for text in (memory.warning, memory.note):
        if text is not None:
            yield "", text
