"""``imatrix``: what the weights of a model meet on a text, for quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Console, write_json, write_stdout
from .loading import check_place, load_model
from .options import Attention, ConsoleOptions, JsonOptions, ModelOptions
from .output_file import check_new
from .texts import ChunkOptions, TextOptions, chunks_of, read_text

if TYPE_CHECKING:
    from ..imatrix import Collection, Coverage
    from ..imatrix_file import Importance

# Experts that a report names one by one.
_NAMED = 16


@dataclass(frozen=True)
class ImatrixOptions(TextOptions):
    """Where the result goes."""

    out: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="GGUF file to write.")
    ] = Path("imatrix.gguf")
    save_every: Annotated[
        int,
        typer.Option(
            "--save-every",
            min=0,
            metavar="N",
            help="Write what there is after every N chunks; 0: at the end only.",
        ),
    ] = 10
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False


def imatrix(
    options: ImatrixOptions,
    chunking: ChunkOptions,
    model_options: ModelOptions,
    output: JsonOptions,
    console_options: ConsoleOptions,
) -> None:
    """Sum up what each weight meets while the model reads a text: its importance."""
    from ..imatrix import collect, coverage
    from ..imatrix_file import write_importance

    check_place(options.out)
    check_new([options.out], force=options.force)
    text = read_text(options.text)
    console = Console(console_options, as_json=output.as_json)
    # Inputs of k_b and v_b exist in the latent only.
    absorbed = replace(model_options, attention=Attention.absorbed)
    with load_model(options.model, chunking, absorbed, console) as model:
        chunks = chunks_of(model, text, chunking)
        found = collect(
            model,
            chunks,
            [options.text.name],
            on_progress=console.progress,
            on_chunk=_saving(options),
        )
    console.progress.clear()
    write_importance(options.out, found.importance)
    rows = coverage(found.importance)
    if output.as_json:
        write_json(_as_json(options.out, found, rows))
    else:
        write_stdout("".join(f"{line}\n" for line in _lines(options.out, found, rows)))


def _saving(options: ImatrixOptions) -> Callable[[Callable[[], Importance]], None]:
    """Writes what there is now and then: a run on a large model takes hours."""
    from ..imatrix_file import write_importance

    n_chunks = 0

    def save(so_far: Callable[[], Importance]) -> None:
        nonlocal n_chunks
        n_chunks += 1
        if options.save_every and n_chunks % options.save_every == 0:
            write_importance(options.out, so_far())

    return save


def _as_json(path: Path, found: Collection, rows: list[Coverage]) -> dict[str, object]:
    return {
        "path": str(path),
        "weights": len(found.importance.weights),
        "chunks": found.importance.n_chunks,
        "chunk_size": found.importance.chunk_size,
        "perplexity": found.perplexity,
        "coverage": [
            {
                "layer": row.layer,
                "experts": row.n_experts,
                "unseen": list(row.unseen),
                "fewest_tokens": row.fewest,
            }
            for row in rows
        ],
    }


def _lines(path: Path, found: Collection, rows: list[Coverage]) -> Iterator[str]:
    inputs = found.importance
    yield (
        f"{path}: {len(inputs.weights)} weights, {inputs.n_chunks} chunks of "
        f"{inputs.chunk_size} tokens, perplexity {found.perplexity:.4f}"
    )
    if not rows:
        return
    unseen = [row for row in rows if row.unseen]
    total, n_unseen = sum(row.n_experts for row in rows), sum(len(row.unseen) for row in rows)
    fewest = min(rows, key=lambda row: row.fewest)
    if not unseen:
        yield (
            f"all {total} experts were used; the fewest tokens, {fewest.fewest}, reached one of "
            f"layer {fewest.layer}"
        )
        return
    yield f"{n_unseen} of {total} experts were never used; more text may reach them:"
    for row in unseen:
        named = ", ".join(map(str, row.unseen[:_NAMED]))
        more = ", ..." if len(row.unseen) > _NAMED else ""
        yield f"  layer {row.layer}: {len(row.unseen)} of {row.n_experts} ({named}{more})"
