"""From options to a loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DeviceError, UsageError
from .console import Console
from .options import ContextOptions, HugePages, ModelOptions
from .units import bytes_text

if TYPE_CHECKING:
    from ..model import Model
    from ..residency import PlacementReport


def load_model(
    path: Path, context: ContextOptions, options: ModelOptions, console: Console
) -> Model:
    """Load the model that the options name, with progress, and print its notes."""
    from .. import _core
    from ..model import Model

    if options.huge_pages is HugePages.off:
        _core.disable_huge_pages()
    model = Model.load(
        path,
        n_ctx=context.n_ctx,
        threads=options.threads,
        attention=options.attention.value,
        cache_type=context.cache_type.value,
        precision=context.precision.value,
        **options.placement(),
        kv_file=options.kv_file,
        mmap=not context.no_mmap,
        mlock=options.mlock,
        isa=options.isa,
        n_batch=context.batch_size,
        tuned=not options.no_tuned,
        on_progress=console.progress,
    )
    console.progress.clear()
    console.notes(model.notes)
    console.detail(memory_text(model))
    for load in model.loaded:
        console.detail(load.text)
    console.detail(
        f"threads: {model.n_threads} ({model.defaults.text}), batch: {model.n_batch}, "
        f"instruction set: {model.isa}"
    )
    show_placement(model, console)
    return model


def check_place(path: Path | None) -> None:
    """Raise UsageError where a file cannot be written later on for want of its directory."""
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"{path}: there is no directory {path.parent}")


def memory_text(model: Model) -> str:
    """One line about the model's memory."""
    memory = model.memory
    return (
        f"memory: weights {bytes_text(memory.weights_mapped_bytes)} mapped and "
        f"{bytes_text(memory.weights_copied_bytes)} copied, cache "
        f"{bytes_text(memory.cache_bytes)} for {model.n_ctx} positions "
        f"({memory.cache_bytes_per_position} bytes each), workspace "
        f"{bytes_text(memory.workspace_bytes)}"
        + (f"; on devices {bytes_text(memory.device_bytes)}" if memory.device_bytes else "")
    )


def show_placement(model: Model, console: Console) -> None:
    """Where weights and cache lie, of a model that has nodes to lie on."""
    if console.is_verbose and len(model.numa.nodes) > 1:
        try:
            report = model.placement_report()
        except DeviceError as error:  # containers often refuse to say where pages lie
            console.detail(f"placement: {error}")
            return
        for line in placement_lines(report):
            console.detail(line)


def placement_lines(report: PlacementReport) -> Iterator[str]:
    """One line for each part, one for each node, one for all."""
    for part in report.parts:
        yield (
            f"{part.label}: {bytes_text(part.n_bytes)}, {100 * part.local_share:.1f} % there"
            + (f", {part.n_strays} pages strayed" if part.n_strays else "")
            + (f", {part.n_moved} moved back" if part.n_moved else "")
            + (f", {bytes_text(part.absent_bytes)} not touched yet" if part.absent_bytes else "")
        )
    for node, n_bytes in sorted(report.node_bytes.items()):
        yield f"node {node}: {bytes_text(n_bytes)}"
    yield f"{100 * report.local_share:.2f} % of all pages lie where they belong"


def model_facts(model: Model, context: ContextOptions, options: ModelOptions) -> dict[str, object]:
    """The model and how it is computed, for JSON."""
    config = model.config
    return {
        "path": str(model.file.paths[0]),
        "name": model.file.metadata.get("general.name"),
        "architecture": model.file.metadata.get("general.architecture"),
        "layout": config.layout,
        "n_layer": config.n_layer,
        "n_vocab": config.n_vocab,
        "n_ctx": model.n_ctx,
        "n_ctx_train": config.n_ctx_train,
        "cache_type": context.cache_type.value,
        "precision": context.precision.value,
        "attention": options.attention.value,
        "isa": model.isa,
        "n_threads": model.n_threads,
        "numa": model.numa.mode,
    }
