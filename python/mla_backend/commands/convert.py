"""``convert``: a checkpoint of the hub becomes a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .options import ConsoleOptions, JsonOptions
from .output_file import OutputOptions
from .planned import Shown, show_or_write


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
    from ..convert.from_hf import ConvertOptions, estimate_seconds, plan_conversion

    wanted = ConvertOptions(
        outtype=options.outtype,
        layout="legacy" if options.legacy_layout else "split",
        keep_nextn=not options.no_mtp,
        max_shard_bytes=file.max_shard_bytes,
        name=options.name,
        pre=options.pre,
        threads=file.threads,
    )
    plan = plan_conversion(options.checkpoint, options.out, wanted)
    shown = Shown(
        type=plan.outtype,
        source_bytes=plan.source_bytes,
        details=[f"  {t.format:8} {list(t.shape)!s:>22}  {t.name}" for t in plan.output.tensors],
        estimate=lambda: estimate_seconds(plan),
        facts={"prediction_layers": plan.n_nextn},
    )
    show_or_write(plan, shown, dry_run=options.dry_run, file=file, output=output, console=console)
