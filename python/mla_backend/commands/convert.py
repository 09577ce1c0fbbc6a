"""``convert``: a checkpoint of the hub becomes a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Console, write_json, write_stdout
from .options import ConsoleOptions, JsonOptions
from .output_file import OutputOptions, check_new, resumable
from .sizes import parse_size
from .units import bytes_text, duration_text

if TYPE_CHECKING:
    from ..convert.from_hf import ConversionPlan, ConvertOptions


@dataclass(frozen=True)
class CheckpointOptions:
    """What to convert, and into what."""

    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="HF_DIR", help="Directory with config.json and safetensors."),
    ]
    out: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file to write.")]
    outtype: Annotated[
        str,
        typer.Option(
            "--outtype", metavar="TYPE", help="File type such as bf16, q8_0, q4_k_m; auto: 16 bits."
        ),
    ] = "auto"
    legacy_layout: Annotated[
        bool,
        typer.Option("--legacy-layout", help="Write attn_kv_b, for programs from before 2025."),
    ] = False
    no_mtp: Annotated[
        bool, typer.Option("--no-mtp", help="Leave out the multi-token-prediction layer.")
    ] = False
    name: Annotated[
        str | None,
        typer.Option("--name", show_default=False, help="Name of the model, else the directory's."),
    ] = None
    pre: Annotated[
        str | None,
        typer.Option(
            "--pre", show_default=False, help="Pre-tokenizer, where it is not recognised."
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")
    ] = False


def convert(
    options: CheckpointOptions, file: OutputOptions, output: JsonOptions, console: ConsoleOptions
) -> None:
    """Convert a checkpoint (bf16, f16, f32 or fp8) to GGUF, quantizing on the way.

    An interrupted conversion goes on where it stopped when the same command is given again.
    """
    from ..convert.from_hf import estimate_seconds, plan_conversion
    from ..convert.output import write_output

    plan = plan_conversion(options.checkpoint, options.out, _options(options, file))
    if not options.dry_run:
        check_new(plan.output.paths, force=file.force)
    printer = Console(console, as_json=output.as_json)
    printer.notes(plan.notes)
    if options.dry_run:
        seconds = estimate_seconds(plan)
        if output.as_json:
            write_json(_as_json(plan) | {"seconds": round(seconds, 3), "written": False})
        else:
            write_stdout(_as_text(plan, seconds, verbose=console.verbose))
        return
    with resumable(printer, plan.output):
        write_output(plan.output, plan.make, plan.n_threads, printer.progress)
    printer.progress.clear()
    if output.as_json:
        write_json(_as_json(plan) | {"written": True})
    else:
        write_stdout("".join(f"{path}\n" for path in plan.output.paths))


def _options(options: CheckpointOptions, file: OutputOptions) -> ConvertOptions:
    from ..convert.from_hf import ConvertOptions

    size = file.split_max_size
    return ConvertOptions(
        outtype=options.outtype,
        layout="legacy" if options.legacy_layout else "split",
        keep_nextn=not options.no_mtp,
        max_shard_bytes=parse_size(size, "--split-max-size") if size is not None else None,
        name=options.name,
        pre=options.pre,
        threads=file.threads,
    )


def _as_json(plan: ConversionPlan) -> dict[str, object]:
    return {
        "paths": [str(path) for path in plan.output.paths],
        "type": plan.outtype,
        "n_bytes": plan.output.n_bytes,
        "source_bytes": plan.source_bytes,
        "prediction_layers": plan.n_nextn,
        "formats": {
            format: {"tensors": count, "bytes": n_bytes}
            for format, (count, n_bytes) in plan.formats().items()
        },
        "notes": list(plan.notes),
    }


def _as_text(plan: ConversionPlan, seconds: float, *, verbose: bool) -> str:
    return "".join(f"{line}\n" for line in _lines(plan, seconds, verbose))


def _lines(plan: ConversionPlan, seconds: float, verbose: bool) -> Iterator[str]:
    for shard in plan.output.shards:
        yield f"{bytes_text(shard.layout.n_bytes):>10}  {shard.path}"
    yield f"type {plan.outtype}, {len(plan.output.tensors)} tensors:"
    for format, (count, n_bytes) in plan.formats().items():
        yield f"  {format:8} {count:5}  {bytes_text(n_bytes):>10}"
    if verbose:
        for tensor in plan.output.tensors:
            yield f"  {tensor.format:8} {list(tensor.shape)!s:>22}  {tensor.name}"
    yield (
        f"reads {bytes_text(plan.source_bytes)}, takes about {duration_text(seconds)} "
        f"on {plan.n_threads} threads"
    )
