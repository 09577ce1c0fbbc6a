"""``quantize``: a GGUF file becomes a smaller one."""

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
    from ..quantize import QuantizePlan


@dataclass(frozen=True)
class QuantizeOptions:
    """What to quantize, and how."""

    model: Annotated[
        Path, typer.Argument(metavar="IN", help="GGUF file; of a split one, any part.")
    ]
    out: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file to write.")]
    type: Annotated[
        str, typer.Argument(metavar="TYPE", help="File type such as q4_k_m, q8_0, iq4_xs.")
    ]
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix", metavar="FILE", show_default=False, help="Importance of the columns."
        ),
    ] = None
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="PATTERN=TYPE",
            show_default=False,
            help="Format of matrices by name, such as ffn_down_exps=q3_k; the first match counts.",
        ),
    ] = None
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="Also quantize what is quantized already."),
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")
    ] = False


def quantize(
    options: QuantizeOptions, file: OutputOptions, output: JsonOptions, console: ConsoleOptions
) -> None:
    """Quantize a GGUF file, by importance where there is some.

    An interrupted quantization goes on where it stopped when the same command is given again.
    """
    from ..convert.output import write_output
    from ..quantize import estimate_seconds

    plan = _plan(options, file)
    if not options.dry_run:
        check_new(plan.output.paths, force=file.force)
    printer = Console(console, as_json=output.as_json)
    printer.notes(plan.notes)
    if options.dry_run:
        seconds = estimate_seconds(plan)
        if output.as_json:
            write_json(_as_json(plan) | {"seconds": round(seconds, 3), "written": False})
        else:
            write_stdout("".join(f"{line}\n" for line in _lines(plan, seconds, console.verbose)))
        return
    with resumable(printer, plan.output):
        write_output(plan.output, plan.make, plan.n_threads, printer.progress)
    printer.progress.clear()
    if output.as_json:
        write_json(_as_json(plan) | {"written": True})
    else:
        write_stdout("".join(f"{path}\n" for path in plan.output.paths))


def _plan(options: QuantizeOptions, file: OutputOptions) -> QuantizePlan:
    from ..quantize import parse_override, plan_quantization

    size = file.split_max_size
    return plan_quantization(
        options.model,
        options.out,
        options.type,
        imatrix=options.imatrix,
        overrides=[parse_override(text) for text in options.tensor_type or ()],
        allow_requantize=options.allow_requantize,
        max_shard_bytes=parse_size(size, "--split-max-size") if size is not None else None,
        threads=file.threads,
    )


def _as_json(plan: QuantizePlan) -> dict[str, object]:
    return {
        "paths": [str(path) for path in plan.output.paths],
        "type": plan.type,
        "n_bytes": plan.output.n_bytes,
        "source_bytes": plan.file.n_bytes,
        "bits_per_weight": round(plan.bits_per_weight(), 3),
        "formats": {
            format: {"tensors": count, "bytes": n_bytes}
            for format, (count, n_bytes) in plan.formats().items()
        },
        "notes": list(plan.notes),
    }


def _lines(plan: QuantizePlan, seconds: float, verbose: bool) -> Iterator[str]:
    for shard in plan.output.shards:
        yield f"{bytes_text(shard.layout.n_bytes):>10}  {shard.path}"
    bits = plan.bits_per_weight()
    yield f"type {plan.type}, {bits:.2f} bits per weight, {len(plan.steps)} tensors:"
    for format, (count, n_bytes) in plan.formats().items():
        yield f"  {format:8} {count:5}  {bytes_text(n_bytes):>10}"
    if verbose:
        for step in plan.steps:
            change = f"{step.source.format} -> {step.target.format}"
            yield f"  {change:16} {list(step.target.shape)!s:>22}  {step.target.name}"
    yield (
        f"reads {bytes_text(plan.file.n_bytes)}, takes about {duration_text(seconds)} "
        f"on {plan.n_threads} threads"
    )
